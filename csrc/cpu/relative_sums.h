// What a task of relative attention's backward sums: dK and dV of a key block, dr, the gradients of the biases; and at
// the end dr and the biases' from the shares of all tasks.
//
// Long sums: dK, dV and dr of TILES_TOGETHER tiles are summed apart and then added to those of earlier ones, dr with
// what those additions round off (sums.h); so are the sums over all rows of a plane.
#pragma once
#include "relative_bwd_plan.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

PYXLBERT_INLINE void add_row(float* sum, const float* row, std::int64_t columns, float factor = 1.0f) {
    for (std::int64_t c = 0; c < columns; c += W) store(sum + c, fma(load(row + c), set1(factor), load(sum + c)));
}

// dK and dV of a block of keys: those of TILES_TOGETHER tiles, and of all before them.
template <class U>
struct KeySums {
    const Plan& plan;
    float *dk, *dv, *all_dk, *all_dv;
    std::int64_t tiles;  // summed in dk and dv since they were gathered last
    std::int64_t keys;   // that one of those tiles has met at most
    bool gathered;       // all_dk and all_dv hold something

    // Of n keys.
    PYXLBERT_INLINE void begin(std::int64_t n) {
        const std::int64_t size = size_of(n);
        clear(dk, size);
        clear(dv, size);
        tiles = keys = 0;
        gathered = false;
    }

    // After a tile that has met n keys.
    PYXLBERT_INLINE void count_tile(std::int64_t n) {
        keys = larger(keys, n);
        if (plan.many_tiles && ++tiles == TILES_TOGETHER) gather(keys);
    }

    PYXLBERT_INLINE void end(std::int64_t n) {
        if (gathered) gather(n);
    }

    PYXLBERT_INLINE const float* whole_dk() const { return gathered ? all_dk : dk; }
    PYXLBERT_INLINE const float* whole_dv() const { return gathered ? all_dv : dv; }

  private:
    PYXLBERT_INLINE std::int64_t size_of(std::int64_t n) const {
        return TILES<U> ? plan.columns * SUM_STRIDE : round_to(n, 2) * plan.columns;
    }

    // dk and dv of n keys at most, to those of earlier tiles of the block.
    PYXLBERT_INLINE void gather(std::int64_t n) {
        const std::int64_t size = size_of(n);
        const auto add = [&](float* sums, float* all) PYXLBERT_LAMBDA {
            for (std::int64_t c = 0; c < size; c += W) store(all + c, load(all + c) + load(sums + c));
            clear(sums, size);
        };
        if (!gathered) {
            const std::int64_t whole = size_of(BACKWARD_BLOCK);
            clear(all_dk, whole);
            clear(all_dv, whole);
        }
        add(dk, all_dk);
        add(dv, all_dv);
        gathered = true;
        tiles = keys = 0;
    }
};

// dr of a task: the rows of one head of a table that its queries meet.
template <class U>
struct TableSums {
    const Plan& plan;
    float *own, *lost;        // where tiles sum, transposed or to be gathered; what additions to `sums` round off
    float* room;              // for W rows
    float* sums;              // the task's share, or null: not needed
    std::int64_t first_row;   // of the table, in sums
    std::int64_t tiles;       // summed in `own` since it was gathered last
    std::int64_t pass_tiles;  // of the key block
    std::int64_t lowest_row, highest_row;  // of `own` that those tiles have touched

    // Where a tile adds its rows from `first` on, untransposed; null: nowhere.
    PYXLBERT_INLINE float* target(std::int64_t first) const {
        return sums == nullptr ? nullptr : (plan.gathers_table ? own : sums) + first * plan.columns;
    }

    PYXLBERT_INLINE void begin(float* share, std::int64_t row) {
        sums = share;
        first_row = row;
        if (sums == nullptr) return;
        const std::int64_t size = plan.table_rows * plan.columns;
        clear(own, plan.dtable);
        if (!TILES<U> || plan.gathers_table) clear(sums, size);
        if (plan.gathers_table) clear(lost, size);
        forget_rows();
    }

    // After a tile that has met `width` rows from `first` on.
    PYXLBERT_INLINE void count_tile(std::int64_t first, std::int64_t width) {
        if (!plan.gathers_table) return;
        lowest_row = smaller(lowest_row, first);
        highest_row = larger(highest_row, first + round_to(width, 2));
        ++pass_tiles;
    }

    // After all tiles of a block of keys.
    PYXLBERT_INLINE void end_pass() {
        tiles += smaller(pass_tiles, MAX_IN_PASS);
        if (plan.gathers_table && tiles >= TABLE_TOGETHER) gather();
    }

    // The task's share is complete.
    void end() {
        if (sums == nullptr) return;
        if (plan.gathers_table) return gather();
        if (!TILES<U>) return;
        for (std::int64_t row = 0; row < plan.table_rows; row += W) {
            rows_of_sums(own + row, plan.table_stride, plan.columns, room);
            __builtin_memcpy(sums + row * plan.columns, room,
                             smaller(W, plan.table_rows - row) * plan.columns * sizeof(float));
        }
    }

  private:
    // The touched rows of `own` to sums.
    void gather() {
        const std::int64_t columns = plan.columns;
        const auto add = [&](std::int64_t row, const float* more) PYXLBERT_LAMBDA {
            add_exactly(sums + row * columns, lost + row * columns, more, columns);
        };
        if constexpr (TILES<U>) {
            const std::int64_t first = lowest_row / W * W, end = smaller(round_to(highest_row, W), plan.table_rows);
            for (std::int64_t row = first; row < end; row += W) {
                rows_of_sums(own + row, plan.table_stride, columns, room);
                for (std::int64_t i = 0; i < smaller(W, end - row); ++i) add(row + i, room + i * columns);
            }
            for (std::int64_t c = 0; c < columns; ++c) clear(own + c * plan.table_stride + first, end - first);
        } else {
            for (std::int64_t row = lowest_row; row < highest_row; ++row) add(row, own + row * columns);
            clear(own + lowest_row * columns, (highest_row - lowest_row) * columns);
        }
        forget_rows();
    }

    PYXLBERT_INLINE void forget_rows() {
        tiles = highest_row = 0;
        lowest_row = plan.table_rows;
    }
};

// A plane's sums over all rows, as `Small` counts them.
struct SmallSums {
    std::int64_t columns;
    float *sums, *lost;  // of the plane; what additions to them round off
    float* run;          // of RUN_LENGTH rows

    PYXLBERT_INLINE void begin() {
        clear(sums, SMALL * columns);
        clear(lost, SMALL * columns);
    }

    PYXLBERT_INLINE void add(int which, std::int64_t c, Vec x) {
        float *total = sums + which * columns + c, *rounded = lost + which * columns + c;
        Vec sum = load(total), rest = load(rounded);
        add_exactly(sum, rest, x);
        store(total, sum);
        store(rounded, rest);
    }

    PYXLBERT_INLINE void begin_run() { clear(run, SMALL * columns); }

    // The sums of segments in `run`.
    PYXLBERT_INLINE void add_run() {
        for (int which = segment; which < SMALL; ++which)
            for (std::int64_t c = 0; c < columns; c += W) add(which, c, load(run + which * columns + c));
        begin_run();
    }
};

// Rows first .. end - 1 of one head of a table: the sum over its groups and parts.
PYXLBERT_INLINE void store_dtable(const RelativeAttentionBwd& a, const Plan& plan, const float* partials,
                                  std::int64_t slice, std::int64_t first, std::int64_t end, float* sum) {
    const AttentionCall& in = a.in.in;
    const std::int64_t table = slice / in.heads, h = slice % in.heads, columns = plan.columns;
    for (std::int64_t row = first; row < end; ++row) {
        for (std::int64_t c = 0; c < columns; c += W) store(sum + c, zero());
        for (std::int64_t set = 0; set < plan.groups * plan.parts; ++set) {
            const std::int64_t part = set % plan.parts, j0 = first_block(plan, part) * BACKWARD_BLOCK;
            const std::int64_t keys = smaller(first_block(plan, part + 1) * BACKWARD_BLOCK, in.keys) - j0;
            const std::int64_t at = row - (a.in.offset + j0 - plan.last_place);
            if (at < 0 || at >= keys + plan.last_place) continue;
            add_row(sum, partials + ((slice * plan.groups * plan.parts + set) * plan.table_rows + at) * columns,
                    columns);
        }
        store_row(a.dtable + ((table * a.in.table_rows + row) * in.heads + h) * in.head_size, sum, in.head_size,
                  in.options.scale);
    }
}

// One head's gradient of a bias or embedding: the sum over its sequences and parts.
PYXLBERT_INLINE void store_small(const RelativeAttentionBwd& a, const Plan& plan, const float* smalls, std::int64_t h,
                                 Small which, float* target, float* sum) {
    const AttentionCall& in = a.in.in;
    for (std::int64_t c = 0; c < plan.columns; c += W) {
        Vec total = zero(), lost = zero();
        for (std::int64_t b = 0; b < in.batch; ++b)
            for (std::int64_t part = 0; part < plan.parts; ++part)
                add_exactly(
                    total, lost,
                    load(smalls + (((b * in.heads + h) * plan.parts + part) * SMALL + which) * plan.columns + c));
        store(sum + c, total);
    }
    store_row(target, sum, in.head_size, in.options.scale);
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
