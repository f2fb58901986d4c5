// The product of many rows with a packed weight, panel by panel, with whatever follows it done while the sums are in
// the first-level cache.
//
// As in gemm_tile.h everything is counted in 32-bit units: a float, or two bfloat16 or some integers that are
// neighbours along K.  A is row-major and its units are broadcast; a panel of the weight is PANEL columns wide and
// holds its units in the order in which they are read, [K units][PANEL].  Six rows of A meet a panel in registers.
//
// K is cut into blocks of K_BLOCK units.  Each is summed from zero in the order of K and added to the blocks before it,
// whatever the number of rows: a row's result does not depend on its neighbours, and a long sum drifts less.
//
// At level amx bfloat16 and integers meet in tiles instead: see gemm_amx.h.
#pragma once
#include "gemm_tile.h"
#include "math.h"
#include "packed_matrix.h"
#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Columns of a panel, rows of a strip, and units of K that are summed from zero.
constexpr int PANEL = STRIP_VECTORS * W, STRIP = 6;
constexpr std::int64_t K_BLOCK = 384;

// The unit in which rows meet a packed weight, and the element of those rows: what a level cannot multiply is widened.
template <class T>
struct Packed {
    using Unit = FloatUnit;
    using Element = float;
};
#if defined(__AVX512BF16__)
template <>
struct Packed<bf16> {
    using Unit = UnitOf<bf16>::Type;
    using Element = bf16;
};
#endif

// What a register of sums holds.
template <class U>
struct SumOf {
    using Type = Vec;
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Four unsigned bytes of A against four signed bytes of the weight.
struct IntegerUnit {
    static constexpr int PAIR = 4;
    using Row = std::uint8_t;
    using Weight = std::int8_t;
    using Sum = VecI;
    static PYXLBERT_INLINE Sum multiply_add(Sum c, Vec a, Vec b) {
        // The intrinsic takes its sum as another type of vector, and gcc 12 then copies every sum in every step.
#if defined(__AVX512VNNI__)
        asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#elif defined(PYXLBERT_EMULATE_VNNI)
        // The same in the encoding of AVX-512, for processors that have that one.
        asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
#else
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
#endif
        return c;
    }
};
#else
// The same numbers as two 16-bit integers.
struct IntegerUnit {
    static constexpr int PAIR = 2;
    using Row = std::int16_t;
    using Weight = std::int16_t;
    using Sum = VecI;
    static PYXLBERT_INLINE Sum multiply_add(Sum c, Vec a, Vec b) {
#if defined(__AVX512F__)
        return c + (VecI)_mm512_madd_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b));
#elif defined(__AVX2__)
        return c + (VecI)_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
#else
        const VecI x = (VecI)a, y = (VecI)b;
        return c + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
    }
};
#endif
template <>
struct SumOf<IntegerUnit> {
    using Type = IntegerUnit::Sum;
};

// Whether products with this weight are made of tiles.
PYXLBERT_INLINE bool tiled([[maybe_unused]] const PackedMatrix& w) {
#if defined(__AMX_BF16__)
    return w.quantised || w.dtype == DType::bfloat16;
#else
    return false;
#endif
}

PYXLBERT_INLINE std::int64_t panels_of(const PackedMatrix& w) {
#if defined(__AMX_BF16__)
    if (tiled(w)) return TileShape(w).panels;
#endif
    return (w.columns + PANEL - 1) / PANEL;
}

template <class U>
PYXLBERT_INLINE std::int64_t units_of(std::int64_t inner) {
    return (inner + U::PAIR - 1) / U::PAIR;
}

// c [R][PANEL] = (ADD: c +) a [R][steps] b [steps][PANEL]
template <class U, int R, bool ADD>
PYXLBERT_INLINE void block(const float* a, std::int64_t a_stride, const float* b, std::int64_t steps, float* c) {
    using Sum = typename SumOf<U>::Type;
    Sum sum[R][STRIP_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < STRIP_VECTORS; ++n) sum[r][n] = Sum{};
    for (std::int64_t k = 0; k < steps; ++k, b += PANEL) {
        Vec row[STRIP_VECTORS];
#pragma GCC unroll 4
        for (int n = 0; n < STRIP_VECTORS; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec x = set1(a[r * a_stride + k]);
#pragma GCC unroll 4
            for (int n = 0; n < STRIP_VECTORS; ++n) sum[r][n] = U::multiply_add(sum[r][n], x, row[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < STRIP_VECTORS; ++n) {
            float* to = c + r * PANEL + n * W;
            if constexpr (__is_same(Sum, Vec))
                store(to, ADD ? load(to) + sum[r][n] : sum[r][n]);
            else
                store(to, (Vec)(ADD ? (VecI)load(to) + (VecI)sum[r][n] : (VecI)sum[r][n]));
        }
}

template <class U, bool ADD>
__attribute__((noinline)) void strip(int rows, const float* a, std::int64_t a_stride, const float* b,
                                     std::int64_t steps, float* c) {
    switch (rows) {
        case 1:
            return block<U, 1, ADD>(a, a_stride, b, steps, c);
        case 2:
            return block<U, 2, ADD>(a, a_stride, b, steps, c);
        case 3:
            return block<U, 3, ADD>(a, a_stride, b, steps, c);
        case 4:
            return block<U, 4, ADD>(a, a_stride, b, steps, c);
        case 5:
            return block<U, 5, ADD>(a, a_stride, b, steps, c);
        default:
            return block<U, 6, ADD>(a, a_stride, b, steps, c);
    }
}

// How the products of `rows` rows are divided over threads: panels of rows, each with all columns, or, of few rows, the
// columns.  A row's sums are the same in any division.  w is the deepest weight that they meet.
struct Division {
    std::int64_t row_step, row_tasks, column_tasks;
};

PYXLBERT_INLINE Division divide(std::int64_t rows, int threads, const PackedMatrix& w) {
    // A panel of rows stays in the second-level cache; with fewer rows a thread waits for the weight.  Its last strip
    // may be short: whole strips for all would give two threads 66 and 62 of 128 rows, and one of them would wait.
    std::int64_t most = 192, least = 48, together = 1;
#if defined(__AMX_BF16__)
    // Tiles outrun the weight unless it meets many rows, but 768 KiB of them leave room for the rest.
    if (tiled(w)) {
        const std::int64_t room = 768 << 10, row = w.inner * (w.quantised ? 1 : 2);
        most = row * 512 <= room ? 512 : row * 128 >= room ? 128 : room / row / BLOCK_ROWS * BLOCK_ROWS;
        least = 64;
        together = BLOCK_ROWS;
    }
#else
    static_cast<void>(w);
#endif
    if (rows < threads * least && threads > 1) return {rows, 1, threads};
    const std::int64_t rounds = (rows + threads * most - 1) / (threads * most), wanted = rounds * threads;
    const std::int64_t step = round_to((rows + wanted - 1) / wanted, together);
    return {step, (rows + step - 1) / step, 1};
}

// Threads that so many multiplications are worth.
PYXLBERT_INLINE int product_team(int threads, std::int64_t multiplications) {
    constexpr std::int64_t worth_a_thread = 1 << 20;
    const std::int64_t wanted = multiplications / worth_a_thread;
    return wanted < 1 ? 1 : wanted < threads ? static_cast<int>(wanted) : threads;
}

// Floats of scratch that a product of so many rows needs.
PYXLBERT_INLINE std::int64_t product_scratch(std::int64_t rows) {
    const std::int64_t strips = round_to(rows, STRIP) * PANEL;
#if defined(__AMX_BF16__)
    const std::int64_t blocks = 2 * blocks_of(rows) * BLOCK_SUMS;
    return blocks > strips ? blocks : strips;
#else
    return strips;
#endif
}

// Hands every row of A with its sums c of `columns` columns from `column` on to the epilogue (see epilogue.h), once
// they are complete.  Panels first .. last - 1 of w; K of A's rows is a multiple of the unit.
template <class U, class Epilogue>
PYXLBERT_INLINE void product(const float* a, std::int64_t a_stride, std::int64_t rows, const PackedMatrix& w,
                             std::int64_t first, std::int64_t last, float* scratch, Epilogue epilogue) {
    const std::int64_t units = units_of<U>(w.inner);
    for (std::int64_t panel = first; panel < last; ++panel) {
        const float* b = static_cast<const float*>(w.data) + panel * units * PANEL;
        const std::int64_t column = panel * PANEL, left = w.columns - column;
        const int columns = static_cast<int>(left < PANEL ? left : PANEL);
        for (std::int64_t k = 0; k < units; k += K_BLOCK) {
            const std::int64_t steps = units - k < K_BLOCK ? units - k : K_BLOCK;
            const bool complete = k + steps == units;
            for (std::int64_t r = 0; r < rows; r += STRIP) {
                const int count = static_cast<int>(rows - r < STRIP ? rows - r : STRIP);
                float* c = scratch + r * PANEL;
                if (k == 0)
                    strip<U, false>(count, a + r * a_stride, a_stride, b, steps, c);
                else
                    strip<U, true>(count, a + r * a_stride + k, a_stride, b + k * PANEL, steps, c);
                if (!complete) continue;
                epilogue.with_row([&](auto finish) PYXLBERT_LAMBDA {
                    for (int i = 0; i < count; ++i) finish(r + i, column, columns, c + i * PANEL);
                });
            }
        }
    }
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
