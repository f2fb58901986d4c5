// The gradient of the position table: a block per rows of the table and head walks the queries of all sequences that
// read it, and of both streams.  Where that would be few blocks the launcher names one table several times, each time
// for a part of the batch, and adds up what comes of them.
//
// Row x of the table is met by query i, at position p, where j = x - offset + p. So scores are laid out by rows of the
// table here, the position's product needs no skew, and keys and values are what is skewed: of 16 queries and BN rows
// it is BN + 15 keys, the products with which are read line by line from a column of its own on (attention_lines.cuh).
#pragma once
#include "cuda/attention_bwd.cuh"

namespace pyxlbert::cuda {

// c [16, BN]: line l / 4 or l / 4 + 8 times row column + n + its shift of a ring, through a warp's band.
template <class T, int D, int N, int BN, int SIZE>
DEVICE void skewed_products(float (&c)[N][4], Band<BN>& band, const T* left, const Ring<T, D, SIZE>& ring, int y,
                            int upper, int lower) {
    band_products<T, D, (BN + 16) / 8>(band, 0, left, ring, y);
    __syncwarp();
    const int g = lane_id() / 4, t2 = lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] += band.read(g + e / 2 * 8, n * 8 + t2 + (e & 1) + (e < 2 ? upper : lower));
    __syncwarp();
}

// The rows of the table of a block, and the sums of theirs.
template <class C>
struct TableSide {
    using T = typename C::T;
    using F = typename C::F;
    static constexpr int D = C::D, N = C::BN / 8;
    const AttentionCall& a;
    int h, first_x;
    T *rows, *content, *dout, *positions, *gradients;
    Ring<T, D, C::RING> keys, values;
    Band<C::BN> band;
    float dtable[1][C::COLUMNS / 8][4];

    DEVICE TableSide(const AttentionCall& a, int h, int first_x) : a(a), h(h), first_x(first_x) {
        band.line0 = reinterpret_cast<float*>(shared_memory() + C::PLACES) + warp_id() * Band<C::BN>::FLOATS;
        rows = reinterpret_cast<T*>(shared_memory() + C::PLACES + C::BANDS);
        content = rows + C::KEYS;
        dout = content + C::QUERIES;
        positions = dout + C::QUERIES;  // two steps of them
        gradients = positions + 2 * C::QUERIES;
        keys = {gradients + C::SCORES, 0};
        values = {keys.rows + C::RING * LD<D>, 0};
        clear_sums();
    }

    // Of the step's stream.
    DEVICE Masks& masks() const { return *reinterpret_cast<Masks*>(shared_memory()); }
    DEVICE Sequence sequence(const Step& step) const { return sequence_of(a, step.sequence); }
    // The key that row 0 of the ring is, at window 0.
    DEVICE int origin() const { return first_x - a.offset; }
    DEVICE bool uniform_rows() const { return F::UNIFORM_ROWS && a.relative.uniform_rows; }
    DEVICE int readable(const Sequence& s) const { return uniform_rows() ? s.extent : s.keys; }
    // The windows in which any query meets any key at these rows.
    DEVICE int lowest(const Step&) const { return max(-origin() - C::BK - C::BM + 2, 0) / C::BM; }
    DEVICE int last(const Step& step) const {
        const Sequence s = sequence(step);
        const Stream& stream = a.stream[step.stream];
        const int all = stream.positions == nullptr ? ceil_div(a.cu_seqlens == nullptr ? stream.rows : s.queries, C::BM)
                                                    : windows_of(a, stream, C::BM);
        return min(all, ceil_div(max(readable(s) - origin(), 0), C::BM));
    }
    DEVICE void enter(const Step& step) const {
        if (threadIdx.x == 0) find_masks<F>(a, a.stream[step.stream], sequence(step), step.sequence, h, masks());
    }
    DEVICE void move() {
        keys.move(C::BM);
        values.move(C::BM);
    }

    DEVICE void fetch(const Step& step, const Place* places, int buffer, bool whole) const {
        const Stream& stream = a.stream[step.stream];
        const int b = step.sequence;
        const Sequence s = sequence(step);
        const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
        load_places<T, D, C::BM, C::THREADS>(content, like_query<T>(a, stream, stream.content, b, h, s.start), stride,
                                             places, a.head_size, false);
        load_places<T, D, C::BM, C::THREADS>(positions + buffer * C::QUERIES,
                                             like_query<T>(a, stream, stream.position, b, h, s.start), stride, places,
                                             a.head_size, false);
        load_places<T, D, C::BM, C::THREADS>(dout, plane_of<T>(stream.dout, b, h, s.start), stream.dout.row, places,
                                             a.head_size, true);
        const std::int32_t* hidden = leaves_hidden_keys<F>(a) ? numbers_of(a, a.key_rank, b, s.start, a.keys) : nullptr;
        const T *key = plane_of<T>(a.key, b, h, s.start), *value = plane_of<T>(a.value, b, h, s.start);
        const int first = origin() + step.window * C::BM, end = readable(s);
        if (whole) {
            load_ring<T, D, C::RING, C::THREADS>(keys, 0, key, a.key.row, first, end, a.head_size, hidden);
            load_ring<T, D, C::RING, C::THREADS>(values, 0, value, a.value.row, first, end, a.head_size, hidden);
        } else if (step.pass == 0) {
            load_ring<T, D, C::BM, C::THREADS>(keys, C::BK, key, a.key.row, first + C::BK, end, a.head_size, hidden);
            load_ring<T, D, C::BM, C::THREADS>(values, C::BK, value, a.value.row, first + C::BK, end, a.head_size,
                                               hidden);
        }
        cp_async_commit();
    }

    DEVICE void multiply(const Step&, const Place* places, int buffer) {
        const Masks& mask = masks();
        const int row = scores_row<C>(), column = scores_column<C>(), g = lane_id() / 4, t2 = lane_id() % 4 * 2;
        const Place &upper = places[row + g], &lower = places[row + g + 8];
        float c[1][N][4], dp[1][N][4];
        clear(c[0]);
        clear(dp[0]);
        // The keys of this thread's first column.
        const int firsts[2] = {origin() + column + t2 + upper.position, origin() + column + t2 + lower.position};
        std::uint32_t seen;
        const Tile tile = tile_of<F, true, N>(seen, mask, upper, lower, firsts);
        if (tile != Tile::EMPTY) {
            multiply_rows<T, D>(c, positions + buffer * C::QUERIES + row * LD<D>, 0, rows + column * LD<D>);
            skewed_products<T, D, N>(c[0], band, content + row * LD<D>, keys, row + column, upper.position & 15,
                                     lower.position & 15);
            skewed_products<T, D, N>(dp[0], band, dout + row * LD<D>, values, row + column, upper.position & 15,
                                     lower.position & 15);
            scores_of<T, F, true, N>(c[0], tile, seen, mask, upper, lower, firsts);
            const bool drops = F::DROPOUT && mask.drops;
            const std::uint32_t kept =
                drops ? kept_bits_skewed<N>(mask.draws, upper.number, lower.number, firsts[0] - t2, firsts[1] - t2)
                      : ~0u;
            gradients_of_scores<N, true>(c[0], dp[0], upper, lower, kept, drops ? a.dropout.scale : 1.0f);
            if constexpr (F::UNIFORM_ROWS)
                clear_constants<N>(dp[0], mask, upper.number, lower.number, firsts[0], firsts[1]);
        }
        store_scores<C>(gradients, dp[0]);
    }

    DEVICE void add(int buffer) {
        [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
        for (int k = 0; k < C::BM; k += Mma<T>::K) add_step<C>(dtable, gradients, positions + buffer * C::QUERIES, k);
    }

    DEVICE void clear_sums() { clear(dtable[0]); }

    // Gives the sums to the result, which has some already if it is `begun`.
    DEVICE void give(bool begun) const {
        const int plane = static_cast<int>(blockIdx.x) / ceil_div(a.table_rows, C::BK), table_number = plane / a.heads;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int x = first_x + summed_rows<C>() + lane_id() / 4 + half * 8, column = summed_column<C>();
            if (x >= a.table_rows) continue;
            float* out = a.dtable +
                         ((static_cast<std::int64_t>(table_number) * a.table_rows + x) * a.heads + h) * a.head_size +
                         column + lane_id() % 4 * 2;
#pragma unroll
            for (int d = 0; d < C::COLUMNS / 8; ++d) {
                if (column + d * 8 >= a.head_size) break;
                give_pair(out + d * 8, dtable[0][d][half * 2] * a.options.scale,
                          dtable[0][d][half * 2 + 1] * a.options.scale, begun);
            }
        }
    }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_table(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    const int blocks = ceil_div(a.table_rows, C::BK);
    const int plane = static_cast<int>(blockIdx.x) / blocks, table_number = plane / a.heads, h = plane % a.heads;
    const int first_x = static_cast<int>(blockIdx.x) % blocks * C::BK;
    const int each = sequences_of_table(a), first_b = table_number * each;
    TableSide<C> side(a, h, first_x);
    load_rows<T, C::D, C::BK, C::THREADS>(
        side.rows, static_cast<const T*>(a.table.data) + table_number * a.table.batch + h * a.table.head, a.table.row,
        first_x, a.table_rows, a.head_size, nullptr);
    Place* places = reinterpret_cast<Place*>(shared_memory() + 2 * MASKS_SIZE);
    QueryWalk<C, TableSide<C>> walk{a, side, places, h, first_b, min(first_b + each, a.batch)};
    walk.run_and_give();
}

template <class C>
constexpr std::size_t shared_of_table() {
    return C::PLACES + C::BANDS + (C::KEYS + 4 * C::QUERIES + C::SCORES + 2 * C::RING * LD<C::D>)*sizeof(typename C::T);
}

template <class T, int D, class F, bool SMALL>
void launch_relative_bwd_of(const AttentionCall& a, CudaStream stream) {
    launch_attention_bwd_of<T, D, F, true, SMALL>(a, stream);
    if (a.dtable == nullptr) return;
    using S = SumTile<T, D, F, true, SMALL>;
    static_assert(shared_of_table<S>() <= BACKWARD_ROOM<T, D, SMALL, true>);
    const std::int64_t blocks = ceil_div(a.table_rows, S::BK);
    launch<attention_bwd_table<S>, shared_of_table<S>()>(grid_of(blocks * a.tables * a.heads), S::THREADS, stream, a);
}

}  // namespace pyxlbert::cuda
