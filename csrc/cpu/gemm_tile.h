// The matrix product under the attention kernels: one micro-kernel, and the packers that feed it.
//
// Everything is counted in 32-bit units.  A unit is a float, or, where the processor multiplies bfloat16
// pairs (VDPBF16PS), two bfloat16 that are neighbours along the summed dimension; then that dimension
// has half as many steps and nothing else changes.
//
//     C [rows, 16 n] = I + A [rows, K] B [K, 16 n]     (16 stands for W, the lanes of a vector)
//
// A is read one unit at a time and broadcast, row-major or transposed, from anywhere in memory.
// B is read a vector at a time: vector n of step k lies at b + n * b_stride + k * k_stride.  Two layouts
// occur: sub-panels [n][K][W] (keys, transposed by pack_transposed) and rows [K][columns] (values).
// I is null for zero, C to accumulate, or any other address with a row stride of its own: a
// relative-position band whose row stride is one less than its width adds its skew this way for free.
//
// No more than RUN steps are summed one after the other: a chain of additions of one sign loses a share of its sum that
// grows with its length.  A longer K is cut into runs, each summed from zero and then added to C; I is added last. Runs
// of 64 took 1.5 % more time, runs of 128 nothing that could be measured.  Tiles begin with I and sum all of K at once:
// their results are rounded to bfloat16, to which 512 terms are few.
#pragma once
#include "simd.h"
#include "tiles.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int STRIP_ROWS = 6, STRIP_VECTORS = 4;  // 24 of 32 registers hold C
#else
constexpr int STRIP_ROWS = 6, STRIP_VECTORS = 2;  // 12 of 16
#endif

constexpr std::int64_t RUN = 128;

constexpr PYXLBERT_INLINE std::int64_t round_to(std::int64_t n, std::int64_t step) {
    return (n + step - 1) / step * step;
}

// ROW_STEP and K_STEP: the products of this unit take multiples of so many rows of A and C, and steps of K.
struct FloatUnit {
    static constexpr int PAIR = 1, ROW_STEP = 2, K_STEP = 1;
    static PYXLBERT_INLINE Vec multiply_add(Vec c, Vec a, Vec b) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16PairUnit {
    static constexpr int PAIR = 2, ROW_STEP = 2, K_STEP = 1;
    static PYXLBERT_INLINE Vec multiply_add(Vec c, Vec a, Vec b) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};
#endif

#if defined(__AMX_BF16__)
// The same pairs through tiles of 16 rows x 16 units: a sub-panel of B already is one.
struct Bf16TileUnit {
    static constexpr int PAIR = 2, ROW_STEP = TILE_ROWS, K_STEP = TILE_UNITS;
    template <int C, int A, int B>
    static PYXLBERT_INLINE void multiply() {
        multiply_tiles_bf16<C, A, B>();
    }
};
#endif

// The unit in which elements of type T are multiplied at this level.
template <class T>
struct UnitOf {
    using Type = FloatUnit;
};
#if defined(__AMX_BF16__)
template <>
struct UnitOf<bf16> {
    using Type = Bf16TileUnit;
};
#elif defined(__AVX512BF16__)
template <>
struct UnitOf<bf16> {
    using Type = Bf16PairUnit;
};
#endif

struct MatrixA {
    const float* data;
    std::int64_t stride;  // between rows, or between steps of K when transposed
};
struct MatrixB {
    const float* data;
    std::int64_t vector_stride, k_stride;
};
struct MatrixC {
    float* data;
    std::int64_t stride;
};

template <class U, bool TRANSPOSED, int R, int N>
PYXLBERT_INLINE void micro_kernel(const float* a, std::int64_t a_stride, const float* b, std::int64_t vector_stride,
                                  std::int64_t k_stride, std::int64_t k_steps, const float* init,
                                  std::int64_t init_stride, float* c, std::int64_t c_stride) {
    for (;;) {
        Vec sum[R][N];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[r][n] = zero();
        const std::int64_t steps = k_steps < RUN ? k_steps : RUN;
        for (std::int64_t k = 0; k < steps; ++k) {
            Vec row[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) row[n] = load(b + n * vector_stride);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec x = set1(TRANSPOSED ? a[r] : a[r * a_stride]);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sum[r][n] = U::multiply_add(sum[r][n], x, row[n]);
            }
            a += TRANSPOSED ? a_stride : 1;
            b += k_stride;
        }
        if (init != nullptr) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sum[r][n] = sum[r][n] + load(init + r * init_stride + n * W);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) store(c + r * c_stride + n * W, sum[r][n]);
        k_steps -= steps;
        if (k_steps == 0) return;
        init = c;
        init_stride = c_stride;
    }
}

// All strips of rows against N vectors of B, which stay in the first-level cache.
template <class U, bool TRANSPOSED, int N>
__attribute__((noinline)) void strips(MatrixA a, const float* b, std::int64_t vector_stride, std::int64_t k_stride,
                                      std::int64_t k_steps, const float* init, std::int64_t init_stride, MatrixC c,
                                      std::int64_t rows) {
    for (std::int64_t r = 0; r < rows; r += STRIP_ROWS) {
        const float* ar = a.data + (TRANSPOSED ? r : r * a.stride);
        const float* ir = init == nullptr ? nullptr : init + r * init_stride;
        float* cr = c.data + r * c.stride;
        const std::int64_t left = rows - r;
        if (left > 4)
            micro_kernel<U, TRANSPOSED, 6, N>(ar, a.stride, b, vector_stride, k_stride, k_steps, ir, init_stride, cr,
                                              c.stride);
        else if (left > 2)
            micro_kernel<U, TRANSPOSED, 4, N>(ar, a.stride, b, vector_stride, k_stride, k_steps, ir, init_stride, cr,
                                              c.stride);
        else
            micro_kernel<U, TRANSPOSED, 2, N>(ar, a.stride, b, vector_stride, k_stride, k_steps, ir, init_stride, cr,
                                              c.stride);
    }
}

// All vectors of B, as many at a time as registers hold.
template <class U, bool TRANSPOSED>
PYXLBERT_INLINE void multiply_vectors(MatrixA a, MatrixB b, std::int64_t k_steps, const float* init,
                                      std::int64_t init_stride, MatrixC c, std::int64_t rows, std::int64_t vectors) {
    for (std::int64_t n = 0; n < vectors;) {
        const std::int64_t left = vectors - n;
        // Five vectors as three and two: a lone vector leaves half of the multipliers idle.
        const int take = left > STRIP_VECTORS + 1    ? STRIP_VECTORS
                         : left == STRIP_VECTORS + 1 ? (STRIP_VECTORS + 2) / 2
                                                     : static_cast<int>(left);
        const float* bn = b.data + n * b.vector_stride;
        const float* in = init == nullptr ? nullptr : init + n * W;
        const MatrixC cn = {c.data + n * W, c.stride};
        switch (take) {
            case 1:
                strips<U, TRANSPOSED, 1>(a, bn, b.vector_stride, b.k_stride, k_steps, in, init_stride, cn, rows);
                break;
            case 2:
                strips<U, TRANSPOSED, 2>(a, bn, b.vector_stride, b.k_stride, k_steps, in, init_stride, cn, rows);
                break;
            case 3:
                if constexpr (STRIP_VECTORS > 2)
                    strips<U, TRANSPOSED, 3>(a, bn, b.vector_stride, b.k_stride, k_steps, in, init_stride, cn, rows);
                break;
            default:
                if constexpr (STRIP_VECTORS > 3)
                    strips<U, TRANSPOSED, 4>(a, bn, b.vector_stride, b.k_stride, k_steps, in, init_stride, cn, rows);
        }
        n += take;
    }
}

#if defined(__AMX_BF16__)

// 32 or 16 rows against two vectors or one.  Tiles 0 to 3 are C, 4 and 5 rows of A, 6 and 7 vectors of B.
template <bool TWO_ROWS, bool TWO_VECTORS>
PYXLBERT_INLINE void tile_kernel(const float* a, std::int64_t a_stride, const float* b, std::int64_t vector_stride,
                                 std::int64_t k_stride, std::int64_t k_steps, const float* init,
                                 std::int64_t init_stride, float* c, std::int64_t c_stride) {
    const std::int64_t init_bytes = init_stride * 4, a_bytes = a_stride * 4, b_bytes = k_stride * 4;
    if (init == nullptr) {
        clear_tile<0>();
        if (TWO_VECTORS) clear_tile<1>();
        if (TWO_ROWS) clear_tile<2>();
        if (TWO_ROWS && TWO_VECTORS) clear_tile<3>();
    } else {
        const float* second = init + 16 * init_stride;
        load_tile<0>(init, init_bytes);
        if (TWO_VECTORS) load_tile<1>(init + W, init_bytes);
        if (TWO_ROWS) load_tile<2>(second, init_bytes);
        if (TWO_ROWS && TWO_VECTORS) load_tile<3>(second + W, init_bytes);
    }
    for (std::int64_t k = 0; k < k_steps; k += 16, a += 16, b += 16 * k_stride) {
        load_tile<6>(b, b_bytes);
        load_tile<4>(a, a_bytes);
        multiply_tiles_bf16<0, 4, 6>();
        if (TWO_VECTORS) {
            load_tile<7>(b + vector_stride, b_bytes);
            multiply_tiles_bf16<1, 4, 7>();
        }
        if (TWO_ROWS) {
            load_tile<5>(a + 16 * a_stride, a_bytes);
            multiply_tiles_bf16<2, 5, 6>();
            if (TWO_VECTORS) multiply_tiles_bf16<3, 5, 7>();
        }
    }
    const std::int64_t c_bytes = c_stride * 4;
    store_tile<0>(c, c_bytes);
    if (TWO_VECTORS) store_tile<1>(c + W, c_bytes);
    if (TWO_ROWS) store_tile<2>(c + 16 * c_stride, c_bytes);
    if (TWO_ROWS && TWO_VECTORS) store_tile<3>(c + 16 * c_stride + W, c_bytes);
}

__attribute__((noinline)) void multiply_tiles(MatrixA a, MatrixB b, std::int64_t k_steps, const float* init,
                                              std::int64_t init_stride, MatrixC c, std::int64_t rows,
                                              std::int64_t vectors) {
    for (std::int64_t n = 0; n < vectors; n += 2) {
        const float* bn = b.data + n * b.vector_stride;
        for (std::int64_t r = 0; r < rows; r += 32) {
            const float* ar = a.data + r * a.stride;
            const float* ir = init == nullptr ? nullptr : init + r * init_stride + n * W;
            float* cr = c.data + r * c.stride + n * W;
            const auto run = [&](auto kernel) PYXLBERT_LAMBDA {
                kernel(ar, a.stride, bn, b.vector_stride, b.k_stride, k_steps, ir, init_stride, cr, c.stride);
            };
            if (r + 32 <= rows)
                n + 2 <= vectors ? run(tile_kernel<true, true>) : run(tile_kernel<true, false>);
            else
                n + 2 <= vectors ? run(tile_kernel<false, true>) : run(tile_kernel<false, false>);
        }
    }
}
#endif

// C = I + A B.  `rows` and `k_steps` are multiples of the unit's steps: rows past the last one have neighbours in A
// and C that belong to nobody, steps past the last one are zero in A or in B and finite in the other.
template <class U, bool TRANSPOSED>
PYXLBERT_INLINE void multiply(MatrixA a, MatrixB b, std::int64_t k_steps, const float* init, std::int64_t init_stride,
                              MatrixC c, std::int64_t rows, std::int64_t vectors) {
#if defined(__AMX_BF16__)
    if constexpr (U::ROW_STEP == TILE_ROWS) {
        static_assert(!TRANSPOSED, "a tile of A holds rows");
        multiply_tiles(a, b, k_steps, init, init_stride, c, rows, vectors);
        return;
    } else
#endif
        multiply_vectors<U, TRANSPOSED>(a, b, k_steps, init, init_stride, c, rows, vectors);
}

// r[i][j] becomes r[j][i].
PYXLBERT_INLINE void transpose(Vec r[W]) {
#if defined(__AVX512F__)
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    const auto low = [](Vec a, Vec b) PYXLBERT_LAMBDA {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](Vec a, Vec b) PYXLBERT_LAMBDA {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = low(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = high(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = low(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = high(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
#elif defined(__AVX2__)
    Vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
#else
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < i; ++j) {
            const float x = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = x;
        }
#endif
}

// The packers read n rows of d elements, stride apart, and never an element past either.

// Units unit .. unit + W - 1 of a row, zero past its d elements.
template <class T, class U>
PYXLBERT_INLINE Vec load_units(const T* row, std::int64_t unit, std::int64_t d) {
    const std::int64_t left = d - unit * U::PAIR;
#if defined(__AVX512BF16__)
    if constexpr (U::PAIR == 2) {
        const __mmask32 lanes = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, row + unit * 2));
    }
#endif
    if (left >= W) return load(row + unit);
    return left > 0 ? load(row + unit, static_cast<int>(left)) : zero();
}

// A: rows as units, [n][stride], zero from d to k_units.
template <class T, class U>
PYXLBERT_INLINE void pack_rows(const T* source, std::int64_t row_stride, std::int64_t n, std::int64_t d, float* target,
                               std::int64_t target_stride, std::int64_t k_units) {
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t u = 0; u < k_units; u += W)
            store(target + i * target_stride + u, load_units<T, U>(source + i * row_stride, u, d));
}

// B, transposed: sub-panels of W rows, [n / W][k_units][W]; rows from n to padded (a multiple of W) are zero.
template <class T, class U>
__attribute__((noinline)) void pack_transposed(const T* source, std::int64_t row_stride, std::int64_t n,
                                               std::int64_t padded, std::int64_t d, float* target,
                                               std::int64_t k_units) {
    for (std::int64_t r = 0; r < padded; r += W, target += k_units * W)
        for (std::int64_t u = 0; u < k_units; u += W) {
            Vec block[W];
            const bool full = r + W <= n && (u + W) * U::PAIR <= d;
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                block[i] = full        ? load_units<T, U>(source + (r + i) * row_stride, u, (u + W) * U::PAIR)
                           : r + i < n ? load_units<T, U>(source + (r + i) * row_stride, u, d)
                                       : zero();
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(target + (u + i) * W, block[i]);
        }
}

#if defined(__AVX512BF16__)
// A, transposed, for pairs along the rows: [columns][target_stride], column c of rows 2 u and 2 u + 1 in unit u;
// zero past n rows (padded is a multiple of 2 W) and d columns.
template <class T, class U>
__attribute__((noinline)) void pack_columns(const T* source, std::int64_t row_stride, std::int64_t n,
                                            std::int64_t padded, std::int64_t d, float* target,
                                            std::int64_t target_stride, std::int64_t columns) {
    for (std::int64_t i0 = 0; i0 < padded; i0 += 2 * W)
        for (std::int64_t c = 0; c < columns; c += W) {
            const __mmask16 lanes = first_lanes(static_cast<int>(d - c));
            Vec block[W];
#pragma GCC unroll 16
            for (int x = 0; x < W; ++x) {
                const std::int64_t i = i0 + 2 * x;
                const T* row = source + i * row_stride + c;
                const __m256i first = _mm256_maskz_loadu_epi16(i < n ? lanes : 0, row);
                const __m256i second = _mm256_maskz_loadu_epi16(i + 1 < n ? lanes : 0, row + row_stride);
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
                block[x] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
            }
            transpose(block);
#pragma GCC unroll 16
            for (int x = 0; x < W; ++x) store(target + (c + x) * target_stride + i0 / 2, block[x]);
        }
}
#endif

// B, in rows: [padded / PAIR][columns], two rows interleaved to a unit; zero past n rows and d columns.
template <class T, class U>
__attribute__((noinline)) void pack_values(const T* source, std::int64_t row_stride, std::int64_t n,
                                           std::int64_t padded, std::int64_t d, float* target, std::int64_t columns) {
    for (std::int64_t j = 0; j < padded; j += U::PAIR, target += columns) {
        const T* row = source + j * row_stride;
        for (std::int64_t c = 0; c < columns; c += W) {
            const int left = static_cast<int>(d - c);
#if defined(__AVX512BF16__)
            if constexpr (U::PAIR == 2) {
                const __mmask16 lanes = first_lanes(left);
                const __m256i first = _mm256_maskz_loadu_epi16(j < n ? lanes : 0, row + c);
                const __m256i second = _mm256_maskz_loadu_epi16(j + 1 < n ? lanes : 0, row + row_stride + c);
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
                store(target + c, _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(first), high)));
                continue;
            }
#endif
            store(target + c, j >= n ? zero() : left >= W ? load(row + c) : left > 0 ? load(row + c, left) : zero());
        }
    }
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
