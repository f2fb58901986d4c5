// The backward kernels of attention, relative_attention and two_stream_attention, from lse alone.
//
//     rows      a block per (queries, head):   delta = sum of dout * out; what lse is short of; the queries with biases
//     keys      a block per (keys, head):      walks all queries, of both streams: dkey, dvalue
//     queries   a block per (queries, head):   walks the keys: dquery, and the sums over queries that biases' gradients
//                                              are made of
//     table     a block per (rows of the table, head):   walks all queries of all sequences that read it: dtable
//     bias      a block per tile of the bias:  walks whatever the bias is broadcast over
//
// Each computes the scores again.  Nothing is added up by two blocks, so that the same bits come out every time.
//
// Where the sum runs over queries a warp has 16 of them as everywhere; its part of the weights and of the scores'
// gradients goes through shared memory, where the warp that has the keys reads it transposed.
//
// Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 2.
#pragma once
#include "cuda/attention_fwd.cuh"

namespace pyxlbert::cuda {

// exp(score - lse), and so the weight.  lse is the logarithm of a sum, rounded; `rest` is what the rounding left.
DEVICE float weight_of(float score, const Place& place) {
    return exp2_approx(__fmul_rn(__fsub_rn(__fsub_rn(score, place.lse), place.rest), LOG2E));
}

// What forward and `rows` have found out about the queries of some places.
template <int ROWS, int THREADS>
DEVICE void find_statistics(const Attention& a, const QueryStream& stream, const Sequence& s, int b, int h,
                            Place* places) {
    const std::int64_t at = statistics_at(a, b, h, s.start, stream.rows);
    for (int r = static_cast<int>(threadIdx.x); r < ROWS; r += THREADS) {
        const int number = places[r].number;
        if (number < 0) continue;
        places[r].lse = stream.lse[at + number];
        places[r].delta = stream.delta[at + number];
        places[r].rest = stream.rest[at + number];
    }
}

// A contiguous tensor like the query, a plane of it.
template <class T>
DEVICE T* like_query(const Attention& a, const QueryStream& stream, void* data, int b, int h, std::int64_t start) {
    return static_cast<T*>(data) + result_row(a, b, h, start, stream.rows, 0) * a.head_size;
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_rows(const __grid_constant__ Attention a) {
    using T = typename C::T;
    constexpr int D = C::D, N = C::BN / 8;
    const QueryStream& stream = a.stream[0];
    Pieces<C> p;
    const int windows = windows_of(a, stream, C::WINDOW);
    const int plane = static_cast<int>(blockIdx.x) / windows, b = plane / a.heads, h = plane % a.heads;
    const int first = static_cast<int>(blockIdx.x) % windows * C::WINDOW;
    const Sequence s = sequence_of(a, b);
    const bool by_number = stream.positions == nullptr;
    const std::int64_t statistics = statistics_at(a, b, h, s.start, stream.rows);
    const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
    if (is_empty<C::WINDOW>(stream, s, b, first)) return;
    if (threadIdx.x == 0) {
        p.masks[0] = masks_of(a, stream, s, b, h);
        *p.walk = walk_of<C>(a, s, p.masks[0], b, h, first, by_number);
    }
    for (int pass = 0;; ++pass) {
        bool more = find_places<C::WINDOW, C::THREADS>(a, stream, s, b, first, pass, p.places);
        more = __syncthreads_or(more);
        const T* dout = plane_of<T>(stream.dout, b, h, s.start);
        const T* out = like_query<T>(a, stream, stream.out, b, h, s.start);
        bool inexact = false;
        for (int r = warp_id(); r < C::ROWS; r += C::WARPS) {
            const int number = p.places[r].number;
            if (number < 0) continue;
            const float lse = stream.lse[statistics + number];
            float sum = 0.0f;
            // A row that sees nothing takes no dout, which may be anything there.
            if (lse != INFINITY_)
                for (int c = lane_id(); c < a.head_size; c += 32)
                    sum += to_float(dout[number * stream.dout.row + c]) * to_float(out[number * stride + c]);
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            inexact = inexact || (lse != INFINITY_ && fabsf(lse) >= 64.0f);
            if (lane_id() == 0) {
                stream.delta[statistics + number] = sum;
                stream.rest[statistics + number] = 0.0f;
                p.places[r].lse = lse;
            }
        }
        const T* query = plane_of<T>(stream.query, b, h, s.start);
        if constexpr (C::RELATIVE) {
            load_biased<T, D, C::ROWS, C::THREADS>(p.content, p.position, a, query, stream.query.row, p.places, h);
            if (C::EXTRAS && a.key_segments != nullptr)
                segment_products<T, C::ROWS, C::WARPS>(a, query, stream.query.row, p.places, h);
        }
        inexact = __syncthreads_or(inexact);
        if constexpr (C::RELATIVE) {
            T* content = like_query<T>(a, stream, stream.content, b, h, s.start);
            T* position = like_query<T>(a, stream, stream.position, b, h, s.start);
            constexpr int EACH = 16 / sizeof(T);
            for (int n = static_cast<int>(threadIdx.x); n < C::ROWS * (D / EACH); n += C::THREADS) {
                const int r = n / (D / EACH), c = n % (D / EACH) * EACH, number = p.places[r].number;
                if (number < 0 || c >= a.head_size) continue;
                *reinterpret_cast<uint4*>(content + number * stride + c) =
                    *reinterpret_cast<const uint4*>(p.content + r * LD<D> + c);
                *reinterpret_cast<uint4*>(position + number * stride + c) =
                    *reinterpret_cast<const uint4*>(p.position + r * LD<D> + c);
            }
        }
        if (inexact) {
            // Around a large lse its own rounding is large: sum exp(score - lse) once more, which is 1 but for that.
            if constexpr (!C::RELATIVE)
                load_places<T, D, C::ROWS, C::THREADS>(p.content, query, stream.query.row, p.places, a.head_size,
                                                       false);
            const Lines<C> lines = lines_of<C>(p);
            const int tiles = ceil_div(p.walk->high, C::BN), row = first_row_of_warp<C>();
            float sum[C::M][2] = {};
            Bands<C> bands(p.bands);
            p.ring.base = 0;
            fetch<C>(p, p.ring, 0, false);
            for (int t = 0; t < tiles; ++t) {
                cp_async_wait<0>();
                __syncthreads();
                Ring<T, D, C::RING> next = p.ring;
                next.move(C::BN);
                if (t + 1 < tiles) fetch<C>(p, next, t + 1, false);
                if (tile_matters<C>(lines, t * C::BN, by_number)) {
                    float c[C::M][N][4];
                    products_of_tile<C>(c, p, t, bands);
                    finish<C>(c, lines, t * C::BN, by_number);
#pragma unroll
                    for (int m = 0; m < C::M; ++m)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const float lse = p.places[row + m * C::STEP + lane_id() / 4 + e / 2 * 8].lse;
#pragma unroll
                            for (int n = 0; n < N; ++n) sum[m][e / 2] += exp_of_difference(c[m][n][e], lse);
                        }
                } else {
                    bands.skip();
                }
                p.ring = next;
            }
            cp_async_wait<0>();
#pragma unroll
            for (int m = 0; m < C::M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Place& place = p.places[row + m * C::STEP + lane_id() / 4 + half * 8];
                    float all = sum[m][half];
                    all += __shfl_xor_sync(0xffffffffu, all, 1);
                    all += __shfl_xor_sync(0xffffffffu, all, 2);
                    const bool counts = place.number >= 0 && place.lse != INFINITY_ && fabsf(place.lse) >= 64.0f;
                    if (counts && lane_id() % 4 == 0) stream.rest[statistics + place.number] = logf(all);
                }
        }
        if (!more) return;
        __syncthreads();
    }
}

// Weights p, with DROPPED what dropout leaves of them, and gradients of the scores from those of the weights dp, in
// place: c becomes p, dp becomes ds.  `kept` says by its bit 4 n + e what is left.
template <int N, bool DROPPED>
DEVICE void gradients_of_scores(float (&c)[N][4], float (&dp)[N][4], const Place& upper, const Place& lower,
                                std::uint32_t kept, float scale) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const Place& place = e < 2 ? upper : lower;
            const float p = weight_of(c[n][e], place);
            const float factor = (kept >> (4 * n + e) & 1) != 0 ? scale : 0.0f;
            c[n][e] = DROPPED ? p * factor : p;
            dp[n][e] = p * (dp[n][e] * factor - place.delta);
        }
}

// What causality hides where rows are uniform is a constant: it has no gradient.  first0 and first1 are the keys of
// c[0][0] and c[0][2].
template <int N>
DEVICE void clear_constants(float (&ds)[N][4], const Masks& masks, int number0, int number1, int first0, int first1) {
    if (!(masks.causal && masks.uniform)) return;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if ((e < 2 ? first0 : first1) + n * 8 + (e & 1) > (e < 2 ? number0 : number1) + masks.shift)
                ds[n][e] = 0.0f;
}

// Shared memory of the `queries` kernel: that of a walk, the gradients of its rows' results, and for each warp the
// gradients of the scores as a band of the table.
template <class C>
struct QueriesTile {
    using T = typename C::T;
    static constexpr int BAND = C::BN + 16, BAND_LD = BAND + 8;
    static constexpr std::size_t DOUT = C::ROWS * LD<C::D> * sizeof(T);
    static constexpr std::size_t DBAND = C::RELATIVE ? C::WARPS * 16 * BAND_LD * sizeof(T) : 0;
    static constexpr std::size_t SHARED = C::SHARED + DOUT + DBAND;
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

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_queries(const __grid_constant__ Attention a) {
    using T = typename C::T;
    using Q = QueriesTile<C>;
    constexpr int D = C::D, N = C::BN / 8;
    const QueryStream& stream = a.stream[0];
    Pieces<C> p;
    T* douts = reinterpret_cast<T*>(shared_memory() + C::SHARED);
    T* dband = reinterpret_cast<T*>(shared_memory() + C::SHARED + Q::DOUT) + warp_id() * 16 * Q::BAND_LD;
    const int windows = windows_of(a, stream, C::WINDOW);
    const int plane = static_cast<int>(blockIdx.x) / windows, b = plane / a.heads, h = plane % a.heads;
    const int window = static_cast<int>(blockIdx.x) % windows, number = a.causal ? windows - 1 - window : window;
    const int first = number * C::WINDOW, row = warp_id() * 16, g = lane_id() / 4, t2 = lane_id() % 4 * 2;
    const Sequence s = sequence_of(a, b);
    const bool by_number = stream.positions == nullptr,
               segments = C::EXTRAS && C::RELATIVE && a.key_segments != nullptr;
    const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
    float* parts = stream.parts == nullptr
                       ? nullptr
                       : stream.parts + (static_cast<std::int64_t>(plane) * windows + number) * 5 * a.head_size;
    if (is_empty<C::WINDOW>(stream, s, b, first)) {
        for (int n = static_cast<int>(threadIdx.x); parts != nullptr && n < 5 * a.head_size; n += C::THREADS)
            parts[n] = 0.0f;
        return;
    }
    if (threadIdx.x == 0) {
        p.masks[0] = masks_of(a, stream, s, b, h);
        *p.walk = walk_of<C>(a, s, p.masks[0], b, h, first, by_number);
    }
    for (int pass = 0;; ++pass) {
        bool more = find_places<C::WINDOW, C::THREADS>(a, stream, s, b, first, pass, p.places);
        find_statistics<C::ROWS, C::THREADS>(a, stream, s, b, h, p.places);
        more = __syncthreads_or(more);
        const T* query = plane_of<T>(stream.query, b, h, s.start);
        if constexpr (C::RELATIVE) {
            load_places<T, D, C::ROWS, C::THREADS>(p.content, like_query<T>(a, stream, stream.content, b, h, s.start),
                                                   stride, p.places, a.head_size, false);
            load_places<T, D, C::ROWS, C::THREADS>(p.position, like_query<T>(a, stream, stream.position, b, h, s.start),
                                                   stride, p.places, a.head_size, false);
            if (segments) {
                segment_products<T, C::ROWS, C::WARPS>(a, query, stream.query.row, p.places, h);
                __syncthreads();
            }
        } else {
            load_places<T, D, C::ROWS, C::THREADS>(p.content, query, stream.query.row, p.places, a.head_size, false);
        }
        load_places<T, D, C::ROWS, C::THREADS>(douts, plane_of<T>(stream.dout, b, h, s.start), stream.dout.row,
                                               p.places, a.head_size, true);
        const Lines<C> lines = lines_of<C>(p);
        const int tiles = ceil_div(p.walk->high, C::BN);
        float content[1][D / 8][4], position[1][C::RELATIVE ? D / 8 : 2][4];
        clear(content[0]);
        clear(position[0]);
        // Of each row: the gradients of scores of keys of the same segment and of the other, the weight of the latter,
        // and the sum of all gradients.
        float same[2] = {}, different[2] = {}, other_weight[2] = {}, total[2] = {};
        Bands<C> bands(p.bands);
        p.ring.base = 0;
        fetch<C>(p, p.ring, 0);
        for (int t = 0; t < tiles; ++t) {
            cp_async_wait<0>();
            __syncthreads();
            Ring<T, D, C::RING> next = p.ring;
            next.move(C::BN);
            if (t + 1 < tiles) fetch<C>(p, next, t + 1);
            const int first_j = t * C::BN;
            if (tile_matters<C>(lines, first_j, by_number)) {
                float c[1][N][4], dp[1][N][4];
                products_of_tile<C>(c, p, t, bands);
                finish<C>(c, lines, first_j, by_number);
                clear(dp[0]);
                multiply_rows<T, D>(dp, douts + row * LD<D>, 0, p.values + t % 2 * C::KEYS);
                const bool drops = C::EXTRAS && p.masks[0].drops;
                const std::uint32_t kept =
                    drops ? kept_bits<N>(p.masks[0], lines.line[0][0]->number, lines.line[0][1]->number, first_j) : ~0u;
                gradients_of_scores<N, false>(c[0], dp[0], p.places[row + g], p.places[row + g + 8], kept,
                                              drops ? a.dropout.scale : 1.0f);
                if (segments)
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) total[e / 2] += dp[0][n][e];
                if constexpr (C::EXTRAS)
                    clear_constants<N>(dp[0], p.masks[0], lines.line[0][0]->number, lines.line[0][1]->number,
                                       first_j + t2, first_j + t2);
                multiply_scores<T, D>(content, dp, p.keys + t % 2 * C::KEYS);
                if (segments) {
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int j = first_j + n * 8 + t2 + (e & 1);
                            const bool other =
                                j < p.masks[0].extent && p.masks[0].key_segments[j] != lines.line[0][e / 2]->segment;
                            same[e / 2] += other ? 0.0f : dp[0][n][e];
                            different[e / 2] += other ? dp[0][n][e] : 0.0f;
                            other_weight[e / 2] += other ? c[0][n][e] : 0.0f;
                        }
                }
                if constexpr (C::RELATIVE) {
                    // The way back of the skew: each line from its own column on, zeros beside it.
                    constexpr int EACH = 16 / sizeof(T);
                    for (int n = lane_id(); n < 16 * Q::BAND / EACH; n += 32) {
                        const int line = n / (Q::BAND / EACH), column = n % (Q::BAND / EACH) * EACH;
                        *reinterpret_cast<uint4*>(dband + line * Q::BAND_LD + column) = make_uint4(0, 0, 0, 0);
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
                        multiply_columns<T, D>(position, left, p.ring.at(y + u));
                    }
                    __syncwarp();
                }
            } else {
                bands.skip();
            }
            p.ring = next;
        }
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (segments) {
#pragma unroll
                for (int offset = 1; offset < 4; offset *= 2) {
                    same[half] += __shfl_xor_sync(0xffffffffu, same[half], offset);
                    different[half] += __shfl_xor_sync(0xffffffffu, different[half], offset);
                    other_weight[half] += __shfl_xor_sync(0xffffffffu, other_weight[half], offset);
                    total[half] += __shfl_xor_sync(0xffffffffu, total[half], offset);
                }
                // A row's gradients are p (dp - delta) and their sum is 0: what is found instead is the error of delta,
                // which is a sum over rounded results, times the weights.
                same[half] -= total[half] * (1.0f - other_weight[half]);
                different[half] -= total[half] * other_weight[half];
            }
            const int line = lines.line[0][half]->number;
            T* dquery = like_query<T>(a, stream, stream.dquery, b, h, s.start) + line * stride + t2;
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                if (line < 0 || d * 8 >= a.head_size) break;
                float pair[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    pair[e] = content[0][d][half * 2 + e];
                    if constexpr (C::RELATIVE) pair[e] += position[0][d][half * 2 + e];
                    if (segments) {
                        float e0[1], e1[1];
                        const std::int64_t at = static_cast<std::int64_t>(h) * a.head_size + d * 8 + t2 + e;
                        load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, at, e0);
                        load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, at + stride, e1);
                        pair[e] += same[half] * e0[0] + different[half] * e1[0];
                    }
                }
                store_pair(dquery + d * 8, pair[0] * a.scale, pair[1] * a.scale);
            }
        }
        if constexpr (C::RELATIVE) {
            if (parts != nullptr) {
                // Sums over the rows of each warp, [2, WARPS, D], and of each row what segments got, where keys were.
                float* sums = reinterpret_cast<float*>(p.content);
                Place* places = p.places;
                float sum[D / 8][2];
#pragma unroll
                for (int kind = 0; kind < 2; ++kind) {
                    sum_rows(kind == 0 ? content[0] : position[0], sum);
                    if (g == 0)
#pragma unroll
                        for (int d = 0; d < D / 8; ++d) {
                            sums[(kind * C::WARPS + warp_id()) * D + d * 8 + t2] = sum[d][0];
                            sums[(kind * C::WARPS + warp_id()) * D + d * 8 + t2 + 1] = sum[d][1];
                        }
                }
                if (lane_id() % 4 == 0)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        places[row + g + half * 8].same = same[half];
                        places[row + g + half * 8].different = different[half];
                    }
                __syncthreads();
                for (int c = static_cast<int>(threadIdx.x); c < a.head_size; c += C::THREADS) {
                    float of_content = 0.0f, of_position = 0.0f, of_same = 0.0f, of_different = 0.0f, of_segment = 0.0f;
                    float e0[1] = {0.0f}, e1[1] = {0.0f}, bias[1] = {0.0f};
                    for (int w = 0; w < C::WARPS; ++w) {
                        of_content += sums[w * D + c];
                        of_position += sums[(C::WARPS + w) * D + c];
                    }
                    if (segments) {
                        const std::int64_t at = static_cast<std::int64_t>(h) * a.head_size + c;
                        load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, at, e0);
                        load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype, at + stride, e1);
                        add_bias<1>(a.segment_bias, h, a.head_size, c, bias);
                        for (int r = 0; r < C::ROWS; ++r) {
                            if (places[r].number < 0) continue;
                            const float x = to_float(query[places[r].number * stream.query.row + c]) + bias[0];
                            of_same += places[r].same * x;
                            of_different += places[r].different * x;
                            // Of a row both come to nothing together: their sums over rows have few digits left.
                            of_segment += places[r].same * e0[0] + places[r].different * e1[0];
                        }
                    }
                    const float found[5] = {of_content, of_position, of_segment, of_same, of_different};
#pragma unroll
                    for (int k = 0; k < 5; ++k) {
                        float* part = parts + k * a.head_size + c;
                        *part = (pass == 0 ? 0.0f : *part) + found[k] * a.scale;
                    }
                }
            }
        }
        if (!more) return;
        __syncthreads();
    }
}

// Tiles of the kernels whose sums run over queries: QW times 16 queries by KW times BN keys, or rows of the table; each
// warp computes 16 by BN of them, and then adds up the rows of 16 keys, SPLIT warps a share of the columns each.
template <class T_, int D_, bool EXTRAS_, bool RELATIVE_>
struct SumTile {
    using T = T_;
    static constexpr int D = D_;
    static constexpr bool EXTRAS = EXTRAS_, RELATIVE = RELATIVE_;
    static constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    static constexpr int QW = WIDE && LONG ? 1 : 2, KW = RELATIVE && LONG && !WIDE ? 4 : 2;
    static constexpr int BN = LONG && (WIDE || RELATIVE) ? 16 : 32;
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
    T* contents = values + C::KEYS;  // two steps of each
    T* positions = contents + 2 * C::QUERIES;
    T* douts = positions + (C::RELATIVE ? 2 * C::QUERIES : 0);
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
            else if (is_empty<C::BM>(a.stream[step.stream], s, b, step.window * C::BM))
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
            load_places<T, D, C::BM, C::THREADS>(positions + buffer * C::QUERIES,
                                                 like_query<T>(a, stream, stream.position, b, h, s.start), stride,
                                                 places, a.head_size, false);
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
        const bool more = find_places<C::BM, C::THREADS>(a, stream, s, b, step.window * C::BM, step.pass, places);
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
        const Step next = settle(more ? Step{b, step.stream, step.window, step.pass + 1, false}
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
                const T* left = positions + buffer * C::QUERIES + row * LD<D>;
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
        // From here on nobody reads the ring or these places.
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
           (2 * C::KEYS + (C::RELATIVE ? 6 : 4) * C::QUERIES + 2 * C::SCORES + (C::RELATIVE ? C::RING * LD<C::D> : 0)) *
               sizeof(typename C::T);
}

// Calls f with each stream that has rows alone: gradients of queries are its own.
template <class F>
void for_each_stream(const Attention& a, F f) {
    for (int n = 0; n < a.streams; ++n)
        if (a.stream[n].rows > 0) f(alone(a, n));
}

template <class T, int D, bool RELATIVE, bool EXTRAS>
void launch_attention_bwd_of(const Attention& a, Stream stream) {
    constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    constexpr int BN = LONG && (WIDE || RELATIVE) ? 16 : RELATIVE || WIDE || LONG ? 32 : 64;
    using W = WalkTile<T, D, EXTRAS, RELATIVE, 1, 1, BN>;
    using S = SumTile<T, D, EXTRAS, RELATIVE>;
    static_assert(QueriesTile<W>::SHARED <= MOST_SHARED && shared_of_keys<S>() <= MOST_SHARED);
    const std::int64_t planes = static_cast<std::int64_t>(a.batch) * a.heads;
    for_each_stream(a, [&](const Attention& one) {
        const std::int64_t windows = windows_of(one, one.stream[0], W::WINDOW);
        launch(attention_bwd_rows<W>, grid_of(windows * planes), W::THREADS, W::SHARED, stream, one);
    });
    launch(attention_bwd_keys<S>, grid_of(ceil_div(a.keys, S::BK) * planes), S::THREADS, shared_of_keys<S>(), stream,
           a);
    for_each_stream(a, [&](const Attention& one) {
        const std::int64_t windows = windows_of(one, one.stream[0], W::WINDOW);
        launch(attention_bwd_queries<W>, grid_of(windows * planes), W::THREADS, QueriesTile<W>::SHARED, stream, one);
    });
}

}  // namespace pyxlbert::cuda
