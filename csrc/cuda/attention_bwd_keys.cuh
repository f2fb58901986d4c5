// The backward kernel of attention that walks the queries, attention_bwd.cuh's `keys`, and what `table` and `bias`
// share with it.
#pragma once
#include "cuda/attention_bwd_scores.cuh"

namespace pyxlbert::cuda {

// Tiles of the kernels whose sums run over queries: QW times 16 queries by KW times BN keys, or rows of the table; each
// warp computes 16 by BN of them, and then adds up the rows of 16 keys, SPLIT warps a share of the columns each.
template <class T_, int D_, bool EXTRAS_, bool RELATIVE_, bool SMALL>
struct SumTile {
    using T = T_;
    static constexpr int D = D_;
    static constexpr bool EXTRAS = EXTRAS_, RELATIVE = RELATIVE_;
    static constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    static constexpr int QW = WIDE && (LONG || SMALL) ? 1 : 2;
    static constexpr int KW = (RELATIVE && LONG && !WIDE ? 4 : 2) / (SMALL && LONG ? 2 : 1);
    static constexpr int BN = SMALL || (LONG && (WIDE || RELATIVE)) ? 16 : 32;
    static constexpr int WARPS = QW * KW, THREADS = 32 * WARPS;
    static constexpr int BM = 16 * QW, BK = BN * KW;
    static constexpr int SPLIT = WARPS / (BK / 16), COLUMNS = D / SPLIT;
    static_assert(SPLIT * BK / 16 == WARPS && COLUMNS % 16 == 0);
    static constexpr int RING = BM + BK;
    static constexpr int SCORES_LD = BK + 8;
    static constexpr int QUERIES = BM * LD<D>, KEYS = BK * LD<D>, SCORES = BM * SCORES_LD;
    static constexpr std::size_t PLACES = MASKS_SIZE * 2 + 2 * BM * sizeof(Place);
    static constexpr std::size_t BANDS = RELATIVE ? WARPS * Band<BN>::FLOATS * sizeof(float) : 0;
};

// The rows of keys that a warp adds up, and from which column on.
template <class C>
DEVICE int summed_rows() {
    return warp_id() % (C::BK / 16) * 16;
}
template <class C>
DEVICE int summed_column() {
    return warp_id() / (C::BK / 16) * C::COLUMNS;
}

// Whether any of a warp's 16 queries may attend any of its keys from first_j on.
template <class C>
DEVICE bool warp_tile_matters(const Masks& mask, const Place& upper, const Place& lower, int first_j) {
    bool some = false;
    if (C::EXTRAS && mask.uniform) return true;
#pragma unroll
    for (int n = 0; n < C::BN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            some =
                some || allowed<C::EXTRAS>(mask, e < 2 ? upper : lower, first_j + n * 8 + lane_id() % 4 * 2 + (e & 1));
    return __any_sync(0xffffffffu, some);
}

// The place of a walk over queries.
struct Step {
    int sequence, stream, window, pass;
    bool done;
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_keys(const __grid_constant__ Attention a) {
    using T = typename C::T;
    constexpr int D = C::D, N = C::BN / 8;
    unsigned char* memory = shared_memory();
    Masks* masks = reinterpret_cast<Masks*>(memory);
    Place* all_places = reinterpret_cast<Place*>(memory + 2 * MASKS_SIZE);
    Band<C::BN> band;
    band.line0 = reinterpret_cast<float*>(memory + C::PLACES) + warp_id() * Band<C::BN>::FLOATS;
    T* keys = reinterpret_cast<T*>(memory + C::PLACES + C::BANDS);
    T* values = keys + C::KEYS;
    T* position = values + C::KEYS;
    T* contents = position + (C::RELATIVE ? C::QUERIES : 0);  // two steps of them, and of douts
    T* douts = contents + 2 * C::QUERIES;
    T* weights = douts + 2 * C::QUERIES;
    T* gradients = weights + C::SCORES;
    Ring<T, D, C::RING> ring = {gradients + C::SCORES, 0};

    const int blocks = ceil_div(a.keys, C::BK);
    const int plane = static_cast<int>(blockIdx.x) / blocks, b = plane / a.heads, h = plane % a.heads;
    const int first_j = static_cast<int>(blockIdx.x) % blocks * C::BK;
    const Sequence s = sequence_of(a, b);
    if (first_j >= s.extent) return;
    const int qw = warp_id() % C::QW, kw = warp_id() / C::QW, g = lane_id() / 4, t2 = lane_id() % 4 * 2;
    const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
    if (threadIdx.x < 2 && static_cast<int>(threadIdx.x) < a.streams)
        *reinterpret_cast<Masks*>(memory + threadIdx.x * MASKS_SIZE) = masks_of(a, a.stream[threadIdx.x], s, b, h);
    __syncthreads();
    const bool uniform = C::EXTRAS && a.uniform;
    const int readable = uniform ? s.extent : s.keys;
    const std::int32_t* hidden = C::EXTRAS && !uniform ? masks->key_rank : nullptr;
    load_rows<T, D, C::BK, C::THREADS>(keys, plane_of<T>(a.key, b, h, s.start), a.key.row, first_j, readable,
                                       a.head_size, hidden);
    load_rows<T, D, C::BK, C::THREADS>(values, plane_of<T>(a.value, b, h, s.start), a.value.row, first_j, readable,
                                       a.head_size, hidden);
    const int my_rows = summed_rows<C>(), my_column = summed_column<C>();
    float dkey[1][C::COLUMNS / 8][4], dvalue[1][C::COLUMNS / 8][4];
    clear(dkey[0]);
    clear(dvalue[0]);

    // The first window that may see these keys.
    auto lowest = [&](int n) {
        const QueryStream& stream = a.stream[n];
        const bool bounded = a.causal && stream.positions == nullptr && !(C::EXTRAS && (uniform || stream.see_self));
        return bounded ? max(first_j - s.shift, 0) / C::BM : 0;
    };
    auto last = [&](int n) {
        const QueryStream& stream = a.stream[n];
        return stream.positions == nullptr
                   ? ceil_div(min(stream.rows, s.queries == a.queries ? stream.rows : s.queries), C::BM)
                   : windows_of(a, stream, C::BM);
    };
    auto settle = [&](Step step) {
        while (step.stream < a.streams) {
            if (step.window >= last(step.stream))
                step = {b, step.stream + 1, step.stream + 1 < a.streams ? lowest(step.stream + 1) : 0, 0, false};
            else if (is_empty<C::RELATIVE, C::BM>(a.stream[step.stream], s, b, step.window * C::BM))
                ++step.window;
            else
                break;
        }
        step.done = step.stream >= a.streams;
        return step;
    };
    // Asks for what a step needs, whose places are found; the ring as that step has it.
    auto fetch = [&](const Step& step, int buffer, bool whole) {
        const QueryStream& stream = a.stream[step.stream];
        const Place* places = all_places + buffer * C::BM;
        if constexpr (C::RELATIVE) {
            load_places<T, D, C::BM, C::THREADS>(contents + buffer * C::QUERIES,
                                                 like_query<T>(a, stream, stream.content, b, h, s.start), stride,
                                                 places, a.head_size, false);
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
            load_places<T, D, C::BM, C::THREADS>(contents + buffer * C::QUERIES,
                                                 plane_of<T>(stream.query, b, h, s.start), stream.query.row, places,
                                                 a.head_size, false);
        }
        load_places<T, D, C::BM, C::THREADS>(douts + buffer * C::QUERIES, plane_of<T>(stream.dout, b, h, s.start),
                                             stream.dout.row, places, a.head_size, true);
        cp_async_commit();
    };
    auto find = [&](const Step& step, int buffer) {
        const QueryStream& stream = a.stream[step.stream];
        Place* places = all_places + buffer * C::BM;
        const bool more =
            find_places<C::RELATIVE, C::BM, C::THREADS>(a, stream, s, b, step.window * C::BM, step.pass, places);
        find_statistics<C::BM, C::THREADS>(a, stream, s, b, h, places);
        return more;
    };

    Step step = settle({b, 0, lowest(0), 0, false});
    bool more = false;
    int buffer = 0;
    if (!step.done) {
        more = __syncthreads_or(find(step, 0));
        fetch(step, 0, true);
    }
    cp_async_commit();
    while (!step.done) {
        cp_async_wait<0>();
        __syncthreads();
        const QueryStream& stream = a.stream[step.stream];
        const Masks& mask = *reinterpret_cast<const Masks*>(memory + step.stream * MASKS_SIZE);
        Place* places = all_places + buffer * C::BM;
        const T* content = contents + buffer * C::QUERIES;
        if (C::EXTRAS && C::RELATIVE && a.key_segments != nullptr) {
            segment_products<T, C::BM, C::WARPS>(a, plane_of<T>(stream.query, b, h, s.start), stream.query.row, places,
                                                 h);
            __syncthreads();
        }
        const Step next = settle(C::RELATIVE && more ? Step{b, step.stream, step.window, step.pass + 1, false}
                                                     : Step{b, step.stream, step.window + 1, 0, false});
        bool next_more = false;
        if (!next.done) next_more = find(next, 1 - buffer);

        float c[1][N][4], dp[1][N][4];
        clear(c[0]);
        clear(dp[0]);
        const int row = qw * 16, column = kw * C::BN;
        const Place &upper = places[row + g], &lower = places[row + g + 8];
        if (warp_tile_matters<C>(mask, upper, lower, first_j + column)) {
            multiply_rows<T, D>(c, content + row * LD<D>, 0, keys + column * LD<D>);
            if constexpr (C::RELATIVE) {
                const T* left = position + row * LD<D>;
                band_products<T, D, (C::BN + 16) / 8>(band, 0, left, ring, column + C::BM - 16 - row);
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
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    c[0][n][e] = score_of<C::EXTRAS>(mask, e < 2 ? upper : lower,
                                                     first_j + column + n * 8 + t2 + (e & 1), c[0][n][e]);
            multiply_rows<T, D>(dp, douts + buffer * C::QUERIES + row * LD<D>, 0, values + column * LD<D>);
            const bool drops = C::EXTRAS && mask.drops;
            const std::uint32_t kept = drops ? kept_bits<N>(mask, upper.number, lower.number, first_j + column) : ~0u;
            gradients_of_scores<N, true>(c[0], dp[0], upper, lower, kept, drops ? a.dropout.scale : 1.0f);
            if constexpr (C::EXTRAS)
                clear_constants<N>(dp[0], mask, upper.number, lower.number, first_j + column + t2,
                                   first_j + column + t2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = (row + g + half * 8) * C::SCORES_LD + column + t2;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                store_pair(weights + at + n * 8, c[0][n][half * 2], c[0][n][half * 2 + 1]);
                store_pair(gradients + at + n * 8, dp[0][n][half * 2], dp[0][n][half * 2 + 1]);
            }
        }
        // From here on nobody reads the ring, these places or positions.
        next_more = __syncthreads_or(next_more);
        if (!next.done) {
            const bool moves = next.stream == step.stream && next.window == step.window + 1;
            const bool stays = next.stream == step.stream && next.window == step.window;
            if (moves) ring.move(-C::BM);
            fetch(next, 1 - buffer, !moves && !stays);
        }
        const T* dout = douts + buffer * C::QUERIES + my_column;
        [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
        for (int k = 0; k < C::BM; k += Mma<T>::K) {
            typename Mma<T>::Left left[1];
            Mma<T>::load_left_transposed(left[0], weights + my_rows, C::SCORES_LD, k);
            multiply_columns<T, D>(dvalue, left, dout + k * LD<D>);
            Mma<T>::load_left_transposed(left[0], gradients + my_rows, C::SCORES_LD, k);
            multiply_columns<T, D>(dkey, left, content + my_column + k * LD<D>);
        }
        step = next;
        more = next_more;
        buffer = 1 - buffer;
    }
    cp_async_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int j = first_j + my_rows + g + half * 8;
        if (j >= s.extent) continue;
        const std::int64_t at = result_row(a, b, h, s.start, a.keys, j) * a.head_size + my_column + t2;
#pragma unroll
        for (int d = 0; d < C::COLUMNS / 8; ++d) {
            if (my_column + d * 8 >= a.head_size) break;
            store_pair(static_cast<T*>(a.dkey) + at + d * 8, dkey[0][d][half * 2] * a.scale,
                       dkey[0][d][half * 2 + 1] * a.scale);
            store_pair(static_cast<T*>(a.dvalue) + at + d * 8, dvalue[0][d][half * 2], dvalue[0][d][half * 2 + 1]);
        }
    }
}

template <class C>
constexpr std::size_t shared_of_keys() {
    return C::PLACES + C::BANDS +
           (2 * C::KEYS + (C::RELATIVE ? 5 : 4) * C::QUERIES + 2 * C::SCORES + (C::RELATIVE ? C::RING * LD<C::D> : 0)) *
               sizeof(typename C::T);
}

}  // namespace pyxlbert::cuda
