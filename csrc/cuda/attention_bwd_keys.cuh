// The backward kernel that walks the queries for a block of keys, attention_bwd.cuh's `keys`: of relative attention,
// and of attention where attention_bwd_key_rows.cuh would not fit the registers.
#pragma once
#include "cuda/attention_bwd_walk.cuh"

namespace pyxlbert::cuda {

// The keys of a block, and the sums of theirs.
template <class C>
struct KeysSide {
    using T = typename C::T;
    using F = typename C::F;
    static constexpr int D = C::D, N = C::BN / 8;
    const AttentionCall& a;
    Sequence s;
    int b, h, first_j;
    T *keys, *values, *position, *contents, *douts, *weights, *gradients;
    Ring<T, D, C::RING> ring;
    Band<C::BN> band;
    float dkey[1][C::COLUMNS / 8][4], dvalue[1][C::COLUMNS / 8][4];

    DEVICE KeysSide(const AttentionCall& a, const Sequence& s, int b, int h, int first_j)
        : a(a), s(s), b(b), h(h), first_j(first_j) {
        band.line0 = reinterpret_cast<float*>(shared_memory() + C::PLACES) + warp_id() * Band<C::BN>::FLOATS;
        keys = reinterpret_cast<T*>(shared_memory() + C::PLACES + C::BANDS);
        values = keys + C::KEYS;
        position = values + C::KEYS;
        contents = position + (C::RELATIVE ? C::QUERIES : 0);  // two steps of them, and of douts
        douts = contents + 2 * C::QUERIES;
        weights = douts + 2 * C::QUERIES;
        gradients = weights + C::SCORES;
        ring = {gradients + C::SCORES, 0};
        clear_sums();
    }

    DEVICE const Masks& masks(int stream) const {
        return *reinterpret_cast<const Masks*>(shared_memory() + stream * MASKS_SIZE);
    }
    DEVICE const Sequence& sequence(const Step&) const { return s; }
    DEVICE int lowest(const Step& step) const {
        const Stream& stream = a.stream[step.stream];
        const bool bounded = a.options.causal && stream.positions == nullptr &&
                             !(F::UNIFORM_ROWS && a.relative.uniform_rows) && !(F::SEE_SELF && stream.options.see_self);
        return bounded ? max(first_j - s.shift, 0) / C::BM : 0;
    }
    // Where a row without any key averages over all of them, all of them are read.
    DEVICE int readable() const { return F::UNIFORM_ROWS && a.relative.uniform_rows ? s.extent : s.keys; }
    DEVICE int last(const Step& step) const {
        // Keys past the length meet nobody.
        if (first_j >= readable()) return 0;
        const Stream& stream = a.stream[step.stream];
        return stream.positions == nullptr
                   ? ceil_div(min(stream.rows, s.queries == a.queries ? stream.rows : s.queries), C::BM)
                   : windows_of(a, stream, C::BM);
    }
    DEVICE void enter(const Step&) const {}
    DEVICE void move() { ring.move(-C::BM); }

    DEVICE void fetch(const Step& step, const Place* places, int buffer, bool whole) const {
        const Stream& stream = a.stream[step.stream];
        T* content = contents + buffer * C::QUERIES;
        if constexpr (C::RELATIVE) {
            const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
            load_places<T, D, C::BM, C::THREADS>(content, like_query<T>(a, stream, stream.content, b, h, s.start),
                                                 stride, places, a.head_size, false);
            load_places<T, D, C::BM, C::THREADS>(position, like_query<T>(a, stream, stream.position, b, h, s.start),
                                                 stride, places, a.head_size, false);
            const int row = a.offset + first_j - step.window * C::BM - C::BM + 1;
            const T* table = table_of<T>(a, b, h);
            if (whole)
                load_ring<T, D, C::RING, C::THREADS>(ring, 0, table, a.table.row, row, a.table_rows, a.head_size,
                                                     nullptr);
            else if (step.pass == 0)
                load_ring<T, D, C::BM, C::THREADS>(ring, 0, table, a.table.row, row, a.table_rows, a.head_size,
                                                   nullptr);
        } else {
            load_places<T, D, C::BM, C::THREADS>(content, plane_of<T>(stream.query, b, h, s.start), stream.query.row,
                                                 places, a.head_size, false);
        }
        load_places<T, D, C::BM, C::THREADS>(douts + buffer * C::QUERIES, plane_of<T>(stream.dout, b, h, s.start),
                                             stream.dout.row, places, a.head_size, true);
        cp_async_commit();
    }

    DEVICE void multiply(const Step& step, const Place* places, int buffer) {
        const Masks& mask = masks(step.stream);
        const int row = scores_row<C>(), column = scores_column<C>(), g = lane_id() / 4, t2 = lane_id() % 4 * 2;
        const Place &upper = places[row + g], &lower = places[row + g + 8];
        float c[1][N][4], dp[1][N][4];
        clear(c[0]);
        clear(dp[0]);
        const int from = first_j + column + t2, first[2] = {from, from};
        std::uint32_t seen;
        const Tile tile = tile_of<F, false, N>(seen, mask, upper, lower, first);
        if (tile != Tile::EMPTY) {
            multiply_rows<T, D>(c, contents + buffer * C::QUERIES + row * LD<D>, 0, keys + column * LD<D>);
            if constexpr (C::RELATIVE) {
                band_products<T, D, (C::BN + 16) / 8>(band, 0, position + row * LD<D>, ring, column + C::BM - 16 - row);
                __syncwarp();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int shift = 15 - ((half == 0 ? upper : lower).position & 15);
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            c[0][n][half * 2 + e] += band.read(g + half * 8, n * 8 + t2 + e + shift);
                }
            }
            scores_of<T, F, false, N>(c[0], tile, seen, mask, upper, lower, first);
            multiply_rows<T, D>(dp, douts + buffer * C::QUERIES + row * LD<D>, 0, values + column * LD<D>);
            const bool drops = F::DROPOUT && mask.drops;
            const std::uint32_t kept =
                drops ? kept_bits<N>(mask.draws, upper.number, lower.number, first_j + column) : ~0u;
            gradients_of_scores<N, true>(c[0], dp[0], upper, lower, kept, drops ? a.dropout.scale : 1.0f);
            if constexpr (F::UNIFORM_ROWS) clear_constants<N>(dp[0], mask, upper.number, lower.number, from, from);
        }
        store_scores<C>(weights, c[0]);
        store_scores<C>(gradients, dp[0]);
    }

    DEVICE void add(int buffer) {
        [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
        for (int k = 0; k < C::BM; k += Mma<T>::K) {
            add_step<C>(dvalue, weights, douts + buffer * C::QUERIES, k);
            add_step<C>(dkey, gradients, contents + buffer * C::QUERIES, k);
        }
    }

    DEVICE void clear_sums() {
        clear(dkey[0]);
        clear(dvalue[0]);
    }

    // Gives the sums to the results, which have some already if they are `begun`.
    DEVICE void give(bool begun) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = first_j + summed_rows<C>() + lane_id() / 4 + half * 8, column = summed_column<C>();
            if (j >= masks(0).extent) continue;  // not s: registers are short
            const std::int64_t at = result_row(a, b, h, s.start, a.keys, j) * a.head_size + column + lane_id() % 4 * 2;
#pragma unroll
            for (int d = 0; d < C::COLUMNS / 8; ++d) {
                if (column + d * 8 >= a.head_size) break;
                give_pair(static_cast<T*>(a.dkey) + at + d * 8, dkey[0][d][half * 2] * a.options.scale,
                          dkey[0][d][half * 2 + 1] * a.options.scale, begun);
                give_pair(static_cast<T*>(a.dvalue) + at + d * 8, dvalue[0][d][half * 2], dvalue[0][d][half * 2 + 1],
                          begun);
            }
        }
    }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_keys(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    const int blocks = ceil_div(a.keys, C::BK);
    const int plane = static_cast<int>(blockIdx.x) / blocks, b = plane / a.heads, h = plane % a.heads;
    const int first_j = static_cast<int>(blockIdx.x) % blocks * C::BK;
    const Sequence s = sequence_of(a, b);
    if (first_j >= s.extent) return;
    if (threadIdx.x < 2 && static_cast<int>(threadIdx.x) < a.streams)
        find_masks<typename C::F>(a, a.stream[threadIdx.x], s, b, h,
                                  *reinterpret_cast<Masks*>(shared_memory() + threadIdx.x * MASKS_SIZE));
    __syncthreads();
    KeysSide<C> side(a, s, b, h, first_j);
    const int readable = side.readable();
    const std::int32_t* hidden = leaves_hidden_keys<typename C::F>(a) ? side.masks(0).key_rank : nullptr;
    load_rows<T, C::D, C::BK, C::THREADS>(side.keys, plane_of<T>(a.key, b, h, s.start), a.key.row, first_j, readable,
                                          a.head_size, hidden);
    load_rows<T, C::D, C::BK, C::THREADS>(side.values, plane_of<T>(a.value, b, h, s.start), a.value.row, first_j,
                                          readable, a.head_size, hidden);
    Place* places = reinterpret_cast<Place*>(shared_memory() + 2 * MASKS_SIZE);
    QueryWalk<C, KeysSide<C>> walk{a, side, places, h, b, b + 1};
    walk.run_and_give();
}

template <class C>
constexpr std::size_t shared_of_keys() {
    return C::PLACES + C::BANDS +
           (2 * C::KEYS + (C::RELATIVE ? 5 : 4) * C::QUERIES + 2 * C::SCORES + (C::RELATIVE ? C::RING * LD<C::D> : 0)) *
               sizeof(typename C::T);
}

}  // namespace pyxlbert::cuda
