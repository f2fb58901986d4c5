// The backward kernel that looks at each query's row first, attention_bwd.cuh's `rows`.
#pragma once
#include "cuda/attention_bwd_scores.cuh"

namespace pyxlbert::cuda {

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_rows(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    constexpr int D = C::D, N = C::BN / 8;
    const Stream& stream = a.stream[0];
    Pieces<C> p;
    const int windows = windows_of(a, stream, C::WINDOW);
    const int plane = static_cast<int>(blockIdx.x) / windows, b = plane / a.heads, h = plane % a.heads;
    const int first = static_cast<int>(blockIdx.x) % windows * C::WINDOW;
    const Sequence s = sequence_of(a, b);
    const bool by_number = stream.positions == nullptr;
    const std::int64_t statistics = statistics_at(a, b, h, s.start, stream.rows);
    const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
    if (is_empty<C::RELATIVE, C::WINDOW>(stream, s, b, first)) return;
    if (threadIdx.x == 0) {
        find_masks<typename C::F>(a, stream, s, b, h, p.masks[0]);
        *p.walk = walk_of<C>(a, s, p.masks[0], b, h, first, by_number);
    }
    for (int pass = 0;; ++pass) {
        bool more =
            find_places<typename C::F, C::RELATIVE, C::WINDOW, C::THREADS>(a, stream, s, b, first, pass, p.places);
        more = __syncthreads_or(more);
        const T* dout = plane_of<T>(stream.dout, b, h, s.start);
        const T* out = like_query<T>(a, stream, stream.out, b, h, s.start);
        bool inexact = false;
        // LANES lanes have a row, 16 bytes each.
        constexpr int EACH = 16 / sizeof(T), LANES = D > 16 * EACH ? 32 : D > 8 * EACH ? 16 : D > 4 * EACH ? 8 : 4;
        static_assert(LANES * EACH >= D && C::ROWS % (C::WARPS * 32 / LANES) == 0);
        const int c = lane_id() % LANES * EACH;
#pragma unroll 2
        for (int r = static_cast<int>(threadIdx.x) / LANES; r < C::ROWS; r += C::THREADS / LANES) {
            const int number = p.places[r].number;
            const float lse = number < 0 ? INFINITY_ : stream.lse[statistics + number];
            float sum = 0.0f;
            // A row that sees nothing takes no dout, which may be anything there.
            if (lse != INFINITY_ && c < a.head_size) {
                float x[EACH], y[EACH];
                load<EACH>(dout + number * stream.dout.row + c, x);
                load<EACH>(out + number * stride + c, y);
#pragma unroll
                for (int e = 0; e < EACH; ++e) sum += x[e] * y[e];
            }
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            inexact = inexact || (lse != INFINITY_ && fabsf(lse) >= INEXACT_LSE);
            if (number >= 0 && lane_id() % LANES == 0) {
                stream.delta[statistics + number] = sum;
                stream.lse_correction[statistics + number] = 0.0f;
                p.places[r].lse = lse;
            }
        }
        const T* query = plane_of<T>(stream.query, b, h, s.start);
        if constexpr (C::RELATIVE) {
            load_biased<T, D, C::ROWS, C::THREADS>(p.content, p.position, a, query, stream.query.row, p.places, h);
            if (C::F::SEGMENTS && a.key_segments != nullptr)
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
            // Around a large lse its own rounding is large: see `lse_correction` in attention_arguments.h.
            if constexpr (!C::RELATIVE)
                load_places<T, D, C::ROWS, C::THREADS>(p.content, query, stream.query.row, p.places, a.head_size,
                                                       false);
            const Lines<C> lines = lines_of<C>(p);
            const int tiles = ceil_div(p.walk->high, C::BN), row = first_row_of_warp<C>();
            Running rows[C::M][2];
            Bands<C> bands(p.bands);
            p.ring.base = 0;
            fetch<C>(p, p.ring, 0, false);
            for (int t = 0; t < tiles; ++t) {
                cp_async_wait<0>();
                __syncthreads();
                Ring<T, D, C::RING> next = p.ring;
                next.move(C::BN);
                if (t + 1 < tiles) fetch<C>(p, next, t + 1, false);
                std::uint32_t seen[C::M];
                const Tile tile = tile_at<C>(seen, lines, t * C::BN, by_number);
                if (tile != Tile::EMPTY) {
                    float c[C::M][N][4];
                    products_of_tile<C>(c, p, t, bands);
                    finish<C>(c, tile, seen, lines, t * C::BN);
#pragma unroll
                    for (int m = 0; m < C::M; ++m)
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            float scores[2 * N];
#pragma unroll
                            for (int n = 0; n < 2 * N; ++n) scores[n] = c[m][n / 2][2 * half + n % 2];
                            rows[m][half].add(scores);
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
                    Running& all = rows[m][half];
                    all.join(1);
                    all.join(2);
                    const bool counts = place.number >= 0 && place.lse != INFINITY_ && fabsf(place.lse) >= INEXACT_LSE;
                    if (counts && lane_id() % 4 == 0)
                        stream.lse_correction[statistics + place.number] = (all.top - place.lse) + logf(all.sum);
                }
        }
        if (!C::RELATIVE || !more) return;
        __syncthreads();
    }
}

}  // namespace pyxlbert::cuda
