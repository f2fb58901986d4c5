// The backward kernel that walks the keys for a block of queries, attention_bwd.cuh's `queries`.
#pragma once
#include "cuda/attention_bwd_scores.cuh"
#include "cuda/sums.cuh"

namespace pyxlbert::cuda {

// Of a row of relative attention: the gradients of scores of keys of the same segment and of the other, the weight of
// the latter, and the sum of all gradients.
struct SegmentSums {
    float same = 0.0f, other = 0.0f, other_weight = 0.0f, total = 0.0f;

    // Over the lanes that have keys of the same row, in all of them.
    DEVICE void join() {
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            same += __shfl_xor_sync(0xffffffffu, same, offset);
            other += __shfl_xor_sync(0xffffffffu, other, offset);
            other_weight += __shfl_xor_sync(0xffffffffu, other_weight, offset);
            total += __shfl_xor_sync(0xffffffffu, total, offset);
        }
    }

    // The nth of them.
    DEVICE float at(int n) const { return n == 0 ? same : n == 1 ? other : n == 2 ? other_weight : total; }
};

// Shared memory of the `queries` kernel: that of a walk, the gradients of its rows' results, and for each warp the
// gradients of the scores as a band of the table.
template <class C>
struct QueriesTile {
    using T = typename C::T;
    static constexpr int BAND = C::BN + 16, BAND_LD = BAND + 8;
    // Blocks that compute the same scores, each for a share of the columns: the gradients of whole rows, from content
    // and from position, would not fit the registers.
    static constexpr int SPLIT = C::RELATIVE && C::WIDE && C::D > 64 ? 2 : 1, COLUMNS = C::D / SPLIT;
    // A warp's rows of dout are the left factor of every tile: short ones stay in registers, and come there by way of
    // shared memory that is not in use yet, the bands' or the keys' and values'.
    static constexpr bool HELD = !C::WIDE && C::D <= 64;
    static constexpr std::size_t DOUT = C::ROWS * LD<C::D> * sizeof(T);
    // A warp has the scores of all keys of a tile at once, and of so many the gradients: of 64 of both the registers
    // would not be enough.
    static constexpr int KEYS_AT_ONCE = C::BN < 64 ? C::BN : 16;
    static_assert(!HELD || (C::RELATIVE ? DOUT <= C::BANDS : C::ROWS <= 4 * C::BN));
    static_assert(C::M == 1 || !C::RELATIVE);
    static constexpr std::size_t DBAND = C::RELATIVE ? C::WARPS * 16 * BAND_LD * sizeof(T) : 0;
    // Where sums are given to the results in between: those over the rows of each warp, [2, WARPS, COLUMNS].  And of
    // each row what segments got so far, and what additions have rounded off, for which registers are short.
    static constexpr std::size_t SUMS = C::WIDE && C::RELATIVE ? 2 * C::WARPS * COLUMNS * sizeof(float) : 0;
    static constexpr std::size_t SEGMENTS = C::WIDE && C::F::SEGMENTS ? C::ROWS * 8 * sizeof(float) : 0;
    // Where the bands begin; all these lie behind them.
    static constexpr std::size_t DBANDS = C::SHARED + (HELD ? 0 : DOUT);
    static constexpr std::size_t SHARED = DBANDS + DBAND + SUMS + SEGMENTS;
};

// The sums over all rows of a warp's tile, by column: lanes 0 .. 3 have those of columns 2 (l % 4) and 2 (l % 4) + 1.
template <int N>
DEVICE void sum_rows(const float (&c)[N][4], float (&sum)[N][2]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float x = c[n][e] + c[n][e + 2];
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
            sum[n][e] = x;
        }
}

// What a window adds to the sums over queries [5, D], or null.
DEVICE float* parts_at(const AttentionCall& a, const Stream& stream, int plane, int windows, int window) {
    if (stream.parts == nullptr) return nullptr;
    return stream.parts + (static_cast<std::int64_t>(plane) * windows + window) * 5 * a.head_size;
}

// Rows of the table that no query meets, of those at positions `lowest` of this window to `highest` of all, stay out of
// the products: 0 times what they hold may be NaN.
template <class T>
DEVICE void leave_unmet_rows_out(Walk& w, const AttentionCall& a, int lowest, int highest, bool causal) {
    const int before = max(a.offset - highest, 0), farthest = w.readable - lowest;
    w.table_rows = min(a.table_rows, a.offset + (causal ? min(farthest, w.sequence.shift + 1) : farthest)) - before;
    w.table = static_cast<const T*>(w.table) + before * w.table_stride;
    w.table_first -= before;
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_queries(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    using Q = QueriesTile<C>;
    constexpr int D = C::D, M = C::M, N = C::BN / 8, P = Q::KEYS_AT_ONCE / 8, COLUMNS = Q::COLUMNS;
    // What follows a tile's gradients has those of all its keys.
    static_assert(P == N || !C::RELATIVE);
    const Stream& stream = a.stream[0];
    Pieces<C> p;
    T* douts = !Q::HELD      ? reinterpret_cast<T*>(shared_memory() + C::SHARED)
               : C::RELATIVE ? reinterpret_cast<T*>(p.bands)
                             : p.keys;
    T* dband = reinterpret_cast<T*>(shared_memory() + Q::DBANDS) + warp_id() * 16 * Q::BAND_LD;
    const int row = first_row_of_warp<C>(), g = lane_id() / 4, t2 = lane_id() % 4 * 2;
    const bool by_number = stream.positions == nullptr,
               segments = C::F::SEGMENTS && C::RELATIVE && a.key_segments != nullptr;
    const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
    {
        const int windows = windows_of(a, stream, C::WINDOW);
        const int block = static_cast<int>(blockIdx.x) / Q::SPLIT, share = static_cast<int>(blockIdx.x) % Q::SPLIT;
        const int plane = block / windows, b = plane / a.heads, h = plane % a.heads;
        const int window = block % windows;
        const int first = (a.options.causal ? windows - 1 - window : window) * C::WINDOW;
        const Sequence s = sequence_of(a, b);
        if (is_empty<C::RELATIVE, C::WINDOW>(stream, s, b, first)) {
            float* parts = parts_at(a, stream, plane, windows, first / C::WINDOW);
            for (int n = static_cast<int>(threadIdx.x); parts != nullptr && share == 0 && n < 5 * a.head_size;
                 n += C::THREADS)
                parts[n] = 0.0f;
            return;
        }
        if (threadIdx.x == 0) {
            find_masks<typename C::F>(a, stream, s, b, h, p.masks[0]);
            *p.walk = walk_of<C>(a, s, p.masks[0], b, h, first, by_number);
            p.walk->column = static_cast<std::int16_t>(share * COLUMNS);
            if constexpr (C::RELATIVE) {
                int lowest = first, highest = min(stream.rows, s.queries) - 1;
                if (!by_number) {
                    const std::int32_t* positions = stream.positions + static_cast<std::int64_t>(b) * stream.rows;
                    lowest = positions[lower_bound(positions, stream.rows, first)];
                    highest = positions[stream.rows - 1];
                }
                leave_unmet_rows_out<T>(*p.walk, a, lowest, highest, a.options.causal && by_number);
            }
        }
        __syncthreads();
    }
    const Walk& w = *p.walk;
    auto column = [&] { return Q::SPLIT > 1 ? w.column : 0; };
    for (int pass = 0;; ++pass) {
        const bool found = find_places<typename C::F, C::RELATIVE, C::WINDOW, C::THREADS>(a, stream, w.sequence, w.b,
                                                                                          w.first, pass, p.places);
        find_statistics<C::ROWS, C::THREADS>(a, stream, w.sequence, w.b, w.h, p.places);
        const bool more = __syncthreads_or(found);
        // Until the walk is over: float32 has no register left for it.
        if (C::RELATIVE && threadIdx.x == 0) p.walk->more = more;
        const T* query = plane_of<T>(stream.query, w.b, w.h, w.sequence.start);
        if constexpr (C::RELATIVE) {
            load_places<T, D, C::ROWS, C::THREADS>(p.content,
                                                   like_query<T>(a, stream, stream.content, w.b, w.h, w.sequence.start),
                                                   stride, p.places, a.head_size, false);
            load_places<T, D, C::ROWS, C::THREADS>(
                p.position, like_query<T>(a, stream, stream.position, w.b, w.h, w.sequence.start), stride, p.places,
                a.head_size, false);
            if (segments) {
                segment_products<T, C::ROWS, C::WARPS>(a, query, stream.query.row, p.places, w.h);
                __syncthreads();
            }
        } else {
            load_places<T, D, C::ROWS, C::THREADS>(p.content, query, stream.query.row, p.places, a.head_size, false);
        }
        load_places<T, D, C::ROWS, C::THREADS>(douts, plane_of<T>(stream.dout, w.b, w.h, w.sequence.start),
                                               stream.dout.row, p.places, a.head_size, true);
        Lines<C> lines = lines_of<C>(p);
        // Sums over rows are made of all of them.
        if constexpr (C::RELATIVE)
            lines.gaps = __any_sync(0xffffffffu, lines.line(0, 0).number < 0 || lines.line(0, 1).number < 0);
        const int tiles = ceil_div(w.high, C::BN);
        float content[M][COLUMNS / 8][4], position[1][C::RELATIVE ? COLUMNS / 8 : 2][4];
#pragma unroll
        for (int m = 0; m < M; ++m) clear(content[m]);
        clear(position[0]);
        SegmentSums of_segments[2];
        // What is kept of the first of this thread's rows, and 8 rows later of the other, from a place that is found
        // anew each time, as registers are short.
        auto row_sums = [&] {
            return reinterpret_cast<float*>(shared_memory() + Q::SHARED - Q::SEGMENTS) +
                   (first_row_of_warp<C>() + lane_id() / 4) * 8;
        };
        if constexpr (Q::SEGMENTS > 0)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                row_sums()[half * 8 * 8 + lane_id() % 4] = row_sums()[half * 8 * 8 + 4 + lane_id() % 4] = 0.0f;
        Bands<C> bands(p.bands);
        p.ring.base = 0;
        if constexpr (C::RELATIVE || !Q::HELD) fetch<C>(p, p.ring, 0);
        [[maybe_unused]] typename Mma<T>::Left held[D / Mma<T>::K][M];
        if constexpr (Q::HELD) {
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
#pragma unroll
            for (int k = 0; k < D; k += Mma<T>::K)
#pragma unroll
                for (int m = 0; m < M; ++m)
                    Mma<T>::load_left(held[k / Mma<T>::K][m], douts + (row + m * 16) * LD<D>, LD<D>, k);
            if constexpr (!C::RELATIVE) {
                __syncthreads();
                fetch<C>(p, p.ring, 0);
            }
        }
        // float32 gives what it has to the results after so many keys, and begins anew.
        constexpr int EACH = TERMS_OF_A_SUM / C::BN;
#pragma unroll 1
        for (int from = 0;; from += EACH) {
            const int to = C::WIDE ? min(from + EACH, tiles) : tiles;
#pragma unroll 1
            for (int t = from; t < to; ++t) {
                cp_async_wait<0>();
                __syncthreads();
                Ring<T, D, C::RING> next = p.ring;
                next.move(C::BN);
                if (t + 1 < tiles) fetch<C>(p, next, t + 1);
                const int first_j = t * C::BN;
                std::uint32_t seen[M];
                const Tile tile = tile_at<C>(seen, lines, first_j, by_number);
                if (tile != Tile::EMPTY) {
                    float c[M][N][4], dp[M][P][4];
                    products_of_tile<C>(c, p, t, bands);
                    finish<C>(c, tile, seen, lines, first_j);
                    // Of this tile, or of all of them.
                    [[maybe_unused]] SegmentSums of_tile[2];
                    SegmentSums(&sums_of_row)[2] = Q::SEGMENTS > 0 ? of_tile : of_segments;
                    const bool drops = C::F::DROPOUT && p.masks[0].drops;
                    std::uint32_t kept[M];
#pragma unroll
                    for (int m = 0; m < M; ++m)
                        kept[m] = drops ? kept_bits<N>(p.masks[0].draws, lines.line(m, 0).number,
                                                       lines.line(m, 1).number, first_j)
                                        : ~0u;
#pragma unroll
                    for (int n0 = 0; n0 < N; n0 += P) {
                        // The compiler would move these products under those of the keys before, with their registers.
                        if (n0 > 0) __syncwarp();
                        const int tile_at = t % 2 * C::KEYS + n0 * 8 * LD<D>, part_j = first_j + n0 * 8;
#pragma unroll
                        for (int m = 0; m < M; ++m) clear(dp[m]);
                        if constexpr (Q::HELD)
                            multiply_held_rows<T, D>(dp, held, p.values + tile_at);
                        else
                            multiply_rows<T, D>(dp, douts + row * LD<D>, 0, p.values + tile_at);
#pragma unroll
                        for (int m = 0; m < M; ++m) {
                            const Place &upper = lines.line(m, 0), &lower = lines.line(m, 1);
                            gradients_of_scores<P, false>(reinterpret_cast<float (&)[P][4]>(c[m][n0]), dp[m], upper,
                                                          lower, kept[m] >> 4 * n0, drops ? a.dropout.scale : 1.0f);
                        }
                        if (segments)
#pragma unroll
                            for (int n = 0; n < P; ++n)
#pragma unroll
                                for (int e = 0; e < 4; ++e) sums_of_row[e / 2].total += dp[0][n][e];
                        if constexpr (C::F::UNIFORM_ROWS)
                            clear_constants<P>(dp[0], p.masks[0], lines.line(0, 0).number, lines.line(0, 1).number,
                                               part_j + t2, part_j + t2);
                        multiply_scores<T, D>(content, dp, p.keys + tile_at + column());
                    }
                    if (segments) {
#pragma unroll
                        for (int n = 0; n < N; ++n)
#pragma unroll
                            for (int e = 0; e < 4; ++e) {
                                const int j = first_j + n * 8 + t2 + (e & 1);
                                const bool is_other =
                                    j < p.masks[0].extent && p.masks[0].key_segments[j] != lines.line(0, e / 2).segment;
                                SegmentSums& sums = sums_of_row[e / 2];
                                sums.same += is_other ? 0.0f : dp[0][n][e];
                                sums.other += is_other ? dp[0][n][e] : 0.0f;
                                sums.other_weight += is_other ? c[0][n][e] : 0.0f;
                            }
                        if constexpr (Q::SEGMENTS > 0)
#pragma unroll
                            for (int half = 0; half < 2; ++half) {
                                of_tile[half].join();
                                float* sum = row_sums() + half * 8 * 8 + lane_id() % 4;
                                add_exactly(sum[0], sum[4], of_tile[half].at(lane_id() % 4));
                            }
                    }
                    if constexpr (C::RELATIVE) {
                        // The way back of the skew: each line from its own column on, zeros beside it.
                        constexpr int EACH = 16 / sizeof(T);
                        [[maybe_unused]] constexpr int AT_ONCE_BAND = C::WIDE ? 1 : 16 * Q::BAND / EACH / 32;
#pragma unroll AT_ONCE_BAND
                        for (int n = lane_id(); n < 16 * Q::BAND / EACH; n += 32) {
                            const int line = n / (Q::BAND / EACH), at = n % (Q::BAND / EACH) * EACH;
                            *reinterpret_cast<uint4*>(dband + line * Q::BAND_LD + at) = make_uint4(0, 0, 0, 0);
                        }
                        __syncwarp();
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            T* at = dband + (g + half * 8) * Q::BAND_LD + 15 -
                                    (p.places[row + g + half * 8].position & 15) + t2;
#pragma unroll
                            for (int n = 0; n < N; ++n) {
                                at[n * 8] = from_float<T>(dp[0][n][half * 2]);
                                at[n * 8 + 1] = from_float<T>(dp[0][n][half * 2 + 1]);
                            }
                        }
                        __syncwarp();
                        const int y = C::WINDOW - 16 - warp_id() * 16;
                        [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
                        for (int u = 0; u < Q::BAND; u += Mma<T>::K) {
                            typename Mma<T>::Left left[1];
                            Mma<T>::load_left(left[0], dband, Q::BAND_LD, u);
                            multiply_columns<T, D>(position, left, p.ring.at(y + u) + column());
                        }
                        __syncwarp();
                    }
                } else {
                    bands.skip();
                }
                p.ring = next;
            }
            const bool last = !C::WIDE || to >= tiles, begun = C::WIDE && from > 0;
            if (last) {
                cp_async_wait<0>();
                __syncthreads();
            }
            if (segments && last) {
                if constexpr (Q::SEGMENTS > 0) __syncwarp();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    SegmentSums& sums = of_segments[half];
                    if constexpr (Q::SEGMENTS > 0) {
                        const float* found = row_sums() + half * 8 * 8;
                        sums = {found[0], found[1], found[2], found[3]};
                    } else {
                        sums.join();
                    }
                    // A row's gradients are p (dp - delta) and their sum is 0: what is found instead is the error of
                    // delta, which is a sum over rounded results, times the weights.
                    sums.same -= sums.total * (1.0f - sums.other_weight);
                    sums.other -= sums.total * sums.other_weight;
                }
            }
#pragma unroll
            for (int at = 0; at < 2 * M; ++at) {
                const int m = at / 2, half = at % 2, line = lines.line(m, half).number;
                T* dquery =
                    like_query<T>(a, stream, stream.dquery, w.b, w.h, w.sequence.start) + line * stride + column() + t2;
#pragma unroll
                for (int d = 0; d < COLUMNS / 8; ++d) {
                    if (line < 0 || column() + d * 8 >= a.head_size) break;
                    float pair[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        pair[e] = content[m][d][half * 2 + e];
                        if constexpr (C::RELATIVE) pair[e] += position[0][d][half * 2 + e];
                        if (segments && last) {
                            float e0[1], e1[1];
                            const std::int64_t from =
                                static_cast<std::int64_t>(w.h) * a.head_size + column() + d * 8 + t2 + e;
                            load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, from, e0);
                            load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, from + stride, e1);
                            pair[e] += of_segments[half].same * e0[0] + of_segments[half].other * e1[0];
                        }
                    }
                    give_pair(dquery + d * 8, pair[0] * a.options.scale, pair[1] * a.options.scale, begun);
                }
            }
            if constexpr (C::RELATIVE) {
                if (stream.parts != nullptr) {
                    float* parts =
                        parts_at(a, stream, w.b * a.heads + w.h, windows_of(a, stream, C::WINDOW), w.first / C::WINDOW);
                    // Sums over the rows of each warp, [2, WARPS, COLUMNS], if not behind everything then where queries
                    // were.
                    float* sums = Q::SUMS > 0 ? reinterpret_cast<float*>(shared_memory() + Q::DBANDS + Q::DBAND)
                                              : reinterpret_cast<float*>(p.content);
                    const T* rows = plane_of<T>(stream.query, w.b, w.h, w.sequence.start);
                    Place* places = p.places;
                    float sum[COLUMNS / 8][2];
#pragma unroll
                    for (int kind = 0; kind < 2; ++kind) {
                        sum_rows(kind == 0 ? content[0] : position[0], sum);
                        if (g == 0)
#pragma unroll
                            for (int d = 0; d < COLUMNS / 8; ++d) {
                                sums[(kind * C::WARPS + warp_id()) * COLUMNS + d * 8 + t2] = sum[d][0];
                                sums[(kind * C::WARPS + warp_id()) * COLUMNS + d * 8 + t2 + 1] = sum[d][1];
                            }
                    }
                    if (last && lane_id() % 4 == 0)
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            places[row + g + half * 8].same = of_segments[half].same;
                            places[row + g + half * 8].other = of_segments[half].other;
                        }
                    __syncthreads();
                    for (int n = static_cast<int>(threadIdx.x); n < COLUMNS; n += C::THREADS) {
                        const int c = column() + n;
                        if (c >= a.head_size) break;
                        float of_content = 0.0f, of_position = 0.0f, of_same = 0.0f, of_other = 0.0f, of_segment = 0.0f;
                        float e0[1] = {0.0f}, e1[1] = {0.0f}, bias[1] = {0.0f};
                        for (int warp = 0; warp < C::WARPS; ++warp) {
                            of_content += sums[warp * COLUMNS + n];
                            of_position += sums[(C::WARPS + warp) * COLUMNS + n];
                        }
                        if (segments && last) {
                            const std::int64_t at = static_cast<std::int64_t>(w.h) * a.head_size + c;
                            load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, at, e0);
                            load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, at + stride, e1);
                            add_bias<1>(a.segment_bias, w.h, a.head_size, c, bias);
                            for (int r = 0; r < C::ROWS; ++r) {
                                if (places[r].number < 0) continue;
                                const float x = to_float(rows[places[r].number * stream.query.row + c]) + bias[0];
                                of_same += places[r].same * x;
                                of_other += places[r].other * x;
                                // Of a row both come to nothing together: their sums over rows have few digits left.
                                of_segment += places[r].same * e0[0] + places[r].other * e1[0];
                            }
                        }
                        const float found[5] = {of_content, of_position, of_segment, of_same, of_other};
#pragma unroll
                        for (int k = 0; k < 5; ++k) {
                            float* part = parts + k * a.head_size + c;
                            *part = (pass == 0 && !begun ? 0.0f : *part) + found[k] * a.options.scale;
                        }
                    }
                }
            }
            if (last) break;
#pragma unroll
            for (int m = 0; m < M; ++m) clear(content[m]);
            clear(position[0]);
        }
        if (!C::RELATIVE || !w.more) return;
        __syncthreads();
    }
}

}  // namespace pyxlbert::cuda
