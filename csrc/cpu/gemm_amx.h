// The product of gemm.h in tiles: blocks of 32 rows meet panels of 32 columns in four of them.
//
// Whatever is loaded lies in the order in which it is loaded.  A step is 16 units of K:
//
//     weight  [K blocks][panels][steps of the block][2 halves][16 units][16 columns]
//     rows    [blocks of 32 rows][steps][2 halves][16 rows][16 units]
//     sums    [blocks of 32 rows][32 rows][32 columns]
//
// The order of the loads decides the speed.  A processor that multiplies two pairs of tiles in 64 cycles can load as
// many in that time from the first-level cache, or one of the two streams from the second-level cache, not both.  So
// K is cut into blocks of BLOCK_STEPS steps: a panel's part of a block, 24 KiB, stays in the first-level cache while
// all blocks of rows pass.  Rows come from the second-level cache once a panel, with loads that leave the first-level
// cache to the weight and the sums: plain loads cost a quarter of the speed, hints for the weight instead cost more.
// Sums go to memory and back between two blocks of K.  Meanwhile the panel's next part is called into the second-level
// cache.
//
// What follows a product is done a panel late: the rows of the panel before are worked off between the products of
// this one, a few in each step, because the vector units are idle there.
//
// Every step adds to a row's sums the products of its 16 units, in the order of K, whatever the number of rows.
#pragma once
#include "gemm_tile.h"
#include "packed_matrix.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Rows and columns of a block of sums, floats of a step of either, and of the sums.
constexpr std::int64_t BLOCK_ROWS = 2 * TILE_ROWS, TILE_PANEL = 2 * TILE_UNITS, STEP_FLOATS = 2 * TILE_FLOATS;
constexpr std::int64_t BLOCK_SUMS = BLOCK_ROWS * TILE_PANEL;
constexpr std::int64_t BLOCK_STEPS = 12, LINE = 64;

// Four unsigned bytes of A against four signed bytes of the weight.
struct ByteTileUnit {
    static constexpr int PAIR = 4;
    template <int C, int A, int B>
    static PYXLBERT_INLINE void multiply() {
        multiply_tiles_bytes<C, A, B>();
    }
};

PYXLBERT_INLINE std::int64_t blocks_of(std::int64_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

// Steps of a packed weight and its panels.
struct TileShape {
    std::int64_t steps, panels;

    PYXLBERT_INLINE explicit TileShape(const PackedMatrix& w) {
        const std::int64_t elements = TILE_UNITS * (w.quantised ? 4 : 2);
        steps = (w.inner + elements - 1) / elements;
        panels = (w.columns + TILE_PANEL - 1) / TILE_PANEL;
    }
    PYXLBERT_INLINE std::int64_t floats() const { return panels * steps * STEP_FLOATS; }
    // Of the block of K that begins with this step.
    PYXLBERT_INLINE std::int64_t block_steps(std::int64_t step) const {
        return steps - step < BLOCK_STEPS ? steps - step : BLOCK_STEPS;
    }
    // A panel's part of that block.
    PYXLBERT_INLINE std::int64_t part(std::int64_t step, std::int64_t panel) const {
        return (step * panels + panel * block_steps(step)) * STEP_FLOATS;
    }
    // A unit of a column.
    PYXLBERT_INLINE std::int64_t at(std::int64_t column, std::int64_t unit) const {
        const std::int64_t step = unit / TILE_UNITS, first = step / BLOCK_STEPS * BLOCK_STEPS;
        return part(first, column / TILE_PANEL) + (step - first) * STEP_FLOATS +
               column % TILE_PANEL / TILE_UNITS * TILE_FLOATS + unit % TILE_UNITS * TILE_UNITS + column % TILE_UNITS;
    }
};

// The first step of a row in tile order.
PYXLBERT_INLINE std::int64_t tile_row(std::int64_t row, std::int64_t steps) {
    return row / BLOCK_ROWS * steps * STEP_FLOATS + row % BLOCK_ROWS * TILE_UNITS;
}

// Rows of n bfloat16, `stride` apart, in tile order, with zeros from n on.
PYXLBERT_INLINE void arrange_rows(const bf16* x, std::int64_t stride, std::int64_t rows, std::int64_t n, float* target,
                                  std::int64_t steps) {
    for (std::int64_t r = 0; r < rows; ++r) {
        float* to = target + tile_row(r, steps);
        for (std::int64_t k = 0; k < steps; ++k)
            store(to + k * STEP_FLOATS, load_units<bf16, Bf16TileUnit>(x + r * stride, k * TILE_UNITS, n));
    }
}

// Memory that the next products will read, on its way into the second-level cache: some lines in every step.
struct Ahead {
    const char* at;
    std::int64_t lines;

    PYXLBERT_INLINE Ahead(const float* part, std::int64_t floats, std::int64_t over_steps)
        : at(reinterpret_cast<const char*>(part)), lines((floats * 4 / LINE + over_steps - 1) / over_steps) {}
    PYXLBERT_INLINE void step() {
        for (std::int64_t i = 0; i < lines; ++i, at += LINE) __builtin_prefetch(at, 0, 2);
    }
};

// c = (add: c +) the product of one block of rows, of which TWO tiles or one, and a panel's part of a block of K.
template <class U, bool TWO, class Work>
PYXLBERT_INLINE void tile_block(const float* a, const float* b, std::int64_t steps, float* c, bool add, Ahead& ahead,
                                Work work) {
    constexpr std::int64_t C_STRIDE = TILE_PANEL * 4;
    float* second = c + TILE_ROWS * TILE_PANEL;
    if (add) {
        load_tile<0>(c, C_STRIDE);
        load_tile<1>(c + TILE_UNITS, C_STRIDE);
        if (TWO) load_tile<2>(second, C_STRIDE);
        if (TWO) load_tile<3>(second + TILE_UNITS, C_STRIDE);
    } else {
        clear_tile<0>();
        clear_tile<1>();
        if (TWO) clear_tile<2>();
        if (TWO) clear_tile<3>();
    }
    for (std::int64_t k = 0; k < steps; ++k, a += STEP_FLOATS, b += STEP_FLOATS) {
        load_tile<6>(b, LINE);
        stream_tile<4>(a, LINE);
        U::template multiply<0, 4, 6>();
        load_tile<7>(b + TILE_FLOATS, LINE);
        U::template multiply<1, 4, 7>();
        if (TWO) stream_tile<5>(a + TILE_FLOATS, LINE);
        if (TWO) U::template multiply<2, 5, 6>();
        ahead.step();
        if (TWO) U::template multiply<3, 5, 7>();
        work();
    }
    store_tile<0>(c, C_STRIDE);
    store_tile<1>(c + TILE_UNITS, C_STRIDE);
    if (TWO) store_tile<2>(second, C_STRIDE);
    if (TWO) store_tile<3>(second + TILE_UNITS, C_STRIDE);
}

// The same for all rows; their blocks lie a_stride floats apart.  work() is called once in every step.
template <class U, class Work>
PYXLBERT_INLINE void tile_blocks(const float* a, std::int64_t a_stride, std::int64_t rows, const float* b,
                                 std::int64_t steps, float* c, bool add, Ahead ahead, Work work) {
    for (std::int64_t r = 0; r < rows; r += BLOCK_ROWS, a += a_stride, c += BLOCK_SUMS)
        rows - r > TILE_ROWS ? tile_block<U, true>(a, b, steps, c, add, ahead, work)
                             : tile_block<U, false>(a, b, steps, c, add, ahead, work);
}

// Rows of a panel whose sums are complete, and which wait for what follows.
struct Waiting {
    float* sums;
    std::int64_t column, columns, next, rows;
    std::int64_t owed;  // in fractions of a row of which `steps` are one

    template <class Row>
    PYXLBERT_INLINE void one(Row finish) {
        finish(next, column, static_cast<int>(columns), sums + next * TILE_PANEL);
        ++next;
    }
    // The share of one of so many steps.
    template <class Row>
    PYXLBERT_INLINE void step(std::int64_t steps, Row finish) {
        for (owed += rows; owed >= steps && next < rows; owed -= steps) one(finish);
    }
    template <class Row>
    PYXLBERT_INLINE void all(Row finish) {
        while (next < rows) one(finish);
    }
};

// `product` of gemm.h for rows in tile order: finish(row, column, columns, c) for every row of every panel.
template <class U, class Row>
__attribute__((noinline)) void tile_product(const float* a, std::int64_t rows, const PackedMatrix& w,
                                            std::int64_t first, std::int64_t last, float* scratch, Row finish) {
    const TileShape shape(w);
    const float* b = static_cast<const float*>(w.data);
    const std::int64_t blocks = blocks_of(rows), all_steps = blocks * shape.steps;
    Waiting waiting{scratch, 0, 0, 0, 0, 0};
    begin_tiles();
    for (std::int64_t panel = first; panel < last; ++panel) {
        float* c = scratch + (panel - first) % 2 * blocks * BLOCK_SUMS;
        for (std::int64_t k = 0; k < shape.steps; k += BLOCK_STEPS) {
            const std::int64_t steps = shape.block_steps(k);
            const bool ends = k + steps == shape.steps;
            // After the last part of all this one once more.
            const std::int64_t next_panel = ends && panel + 1 < last ? panel + 1 : panel;
            const std::int64_t next_k = !ends ? k + steps : next_panel != panel ? 0 : k;
            const Ahead ahead(b + shape.part(next_k, next_panel), shape.block_steps(next_k) * STEP_FLOATS,
                              blocks * steps);
            tile_blocks<U>(a + k * STEP_FLOATS, shape.steps * STEP_FLOATS, rows, b + shape.part(k, panel), steps, c,
                           k > 0, ahead, [&]() PYXLBERT_LAMBDA { waiting.step(all_steps, finish); });
        }
        waiting.all(finish);
        const std::int64_t column = panel * TILE_PANEL, left = w.columns - column;
        waiting = {c, column, left < TILE_PANEL ? left : TILE_PANEL, 0, rows, 0};
    }
    waiting.all(finish);
    end_tiles();
}

// sums [panels][blocks of rows][32][32] = (add: sums +) the product of rows in tile order, as many steps of each as the
// block of K that begins with step k of the weight has, and that block.
[[maybe_unused]] __attribute__((noinline)) void tile_add_block(const float* a, std::int64_t rows, const PackedMatrix& w,
                                                               std::int64_t k, float* sums, bool add) {
    const TileShape shape(w);
    const float* b = static_cast<const float*>(w.data);
    const std::int64_t blocks = blocks_of(rows), steps = shape.block_steps(k);
    begin_tiles();
    for (std::int64_t panel = 0; panel < shape.panels; ++panel) {
        const std::int64_t next = panel + 1 < shape.panels ? panel + 1 : panel;
        tile_blocks<Bf16TileUnit>(
            a, steps * STEP_FLOATS, rows, b + shape.part(k, panel), steps, sums + panel * blocks * BLOCK_SUMS, add,
            Ahead(b + shape.part(k, next), steps * STEP_FLOATS, blocks * steps), []() PYXLBERT_LAMBDA {});
    }
    end_tiles();
}

// finish(row, column, columns, c) for all of those sums.
template <class Row>
PYXLBERT_INLINE void tile_over_sums(float* sums, std::int64_t rows, const PackedMatrix& w, Row finish) {
    const std::int64_t panels = TileShape(w).panels, panel_sums = blocks_of(rows) * BLOCK_SUMS;
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t panel = 0; panel < panels; ++panel) {
            const std::int64_t column = panel * TILE_PANEL, left = w.columns - column;
            finish(row, column, static_cast<int>(left < TILE_PANEL ? left : TILE_PANEL),
                   sums + panel * panel_sums + row * TILE_PANEL);
        }
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
