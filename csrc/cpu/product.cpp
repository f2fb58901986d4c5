// A product of training: neither operand has been packed before, and none is met again.
//
// B goes into the panels of gemm.h, from float32 too, so that nobody has to round a weight for it first.  Rows of A are
// read as they lie where their pairs are neighbours in memory; of a transposed A, which a weight's gradient has, each
// task packs its own rows while they are in its cache.
#include "product.h"

#if defined(__AVX512BF16__)
#include "gemm.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

using Unit = Packed<bf16>::Unit;

// Bytes of B that are packed at a time; the last-level cache holds them until they have met all rows.
constexpr std::int64_t PACKED_AT_ONCE = 8 << 20;

// Rows of K that a transposed A has at a time: its packed rows stay in the second-level cache.
constexpr std::int64_t DEEPEST = 2048;

// Pairs of neighbours, as many as `left` elements make, zeros behind them.
PYXLBERT_INLINE Vec pairs(const bf16* p, std::int64_t left) { return load_units<bf16, Unit>(p, 0, left); }
PYXLBERT_INLINE Vec pairs(const float* p, std::int64_t left) {
    const int n = left < 2 * W ? static_cast<int>(left) : 2 * W;
    const Vec low = n >= W ? load(p) : load(p, n);
    const Vec high = n >= 2 * W ? load(p + W) : n > W ? load(p + W, n - W) : zero();
    return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low));
}

// W elements as the low halves of units; n of them, zeros behind.
PYXLBERT_INLINE __m512i halves(const bf16* p, int n) {
    watch_load(p, n < W ? n : W);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
PYXLBERT_INLINE __m512i halves(const float* p, int n) {
    return _mm512_cvtepu16_epi32(narrow(n >= W ? load(p) : load(p, n), bf16{}));
}

// One panel of B, [units][PANEL], from its first column; `columns` of it exist.
template <class T>
__attribute__((noinline)) void pack_along_inner(const T* b, std::int64_t column_stride, std::int64_t inner,
                                                std::int64_t columns, float* target) {
    const std::int64_t units = units_of<Unit>(inner);
    for (std::int64_t c = 0; c < PANEL; c += W)
        for (std::int64_t u = 0; u < units; u += W) {
            Vec part[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                part[i] = c + i < columns ? pairs(b + (c + i) * column_stride + 2 * u, inner - 2 * u) : zero();
            transpose(part);
            const std::int64_t count = units - u < W ? units - u : W;
            for (std::int64_t i = 0; i < count; ++i) store(target + (u + i) * PANEL + c, part[i]);
        }
}

template <class T>
__attribute__((noinline)) void pack_along_columns(const T* b, std::int64_t inner_stride, std::int64_t inner,
                                                  std::int64_t columns, float* target) {
    for (std::int64_t k = 0; k < inner; k += 2, target += PANEL) {
        const T* row = b + k * inner_stride;
        const bool both = k + 1 < inner;
        for (int c = 0; c < PANEL; c += W) {
            const int n = static_cast<int>(columns - c);
            if (n <= 0) {
                store(target + c, zero());
                continue;
            }
            const __m512i low = halves(row + c, n);
            const __m512i high = both ? halves(row + inner_stride + c, n) : _mm512_setzero_si512();
            store(target + c, _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16))));
        }
    }
}

// Panel `panel` of B from row `k` of K on.
template <class T>
PYXLBERT_INLINE void pack_panel(const Product& p, std::int64_t k, std::int64_t inner, std::int64_t panel,
                                float* target) {
    const std::int64_t left = p.columns - panel * PANEL, columns = left < PANEL ? left : PANEL;
    const T* b = static_cast<const T*>(p.b) + k * p.b_inner_stride + panel * PANEL * p.b_column_stride;
    if (p.b_column_stride == 1)
        pack_along_columns(b, p.b_inner_stride, inner, columns, target);
    else
        pack_along_inner(b, p.b_column_stride, inner, columns, target);
}

// Floats of a weight's gradient that the second-level cache does not hold.
constexpr std::int64_t LARGE_GRADIENT = 1 << 18;

// c (+)= sums + bias.  Whole cache lines of a large gradient of a weight go past the caches: nobody reads them before
// all other gradients are there, and lines that are overwritten whole need not be fetched first.
template <class T>
struct StoreSums {
    T* c;
    std::int64_t stride;
    const float* bias;
    bool add, past_caches;

    template <class F>
    PYXLBERT_INLINE void with_row(F use) const {
        use([*this](std::int64_t row, std::int64_t column, int columns, const float* sums) PYXLBERT_LAMBDA {
            T* to = c + row * stride + column;
            for_vectors(columns, [&](std::int64_t n, int count) PYXLBERT_LAMBDA {
                Vec y = load(sums + n);
                if constexpr (__is_same(T, float))
                    if (past_caches && count == W && reinterpret_cast<std::uintptr_t>(to + n) % 64 == 0) {
                        watch_store(to + n, W);
                        _mm512_stream_ps(to + n, y);
                        return;
                    }
                if (bias != nullptr) y += load_some(bias + column + n, count);
                if (add) y += load_some(to + n, count);
                store_some(to + n, y, count);
            });
        });
    }
};

// Rows row .. row + rows - 1 of A from row `k` of K on, packed to `target` unless their units lie side by side.
struct RowsOfA {
    const float* data;
    std::int64_t stride;  // in units
};
PYXLBERT_INLINE std::int64_t packed_stride(std::int64_t inner) { return round_to(inner, 2 * W) / 2; }

PYXLBERT_INLINE bool in_units(const Product& p) {
    return !p.transposed && p.inner % 2 == 0 && p.a_stride % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(p.a) % sizeof(float) == 0;
}

PYXLBERT_INLINE RowsOfA rows_of_a(const Product& p, std::int64_t k, std::int64_t inner, std::int64_t row,
                                  std::int64_t rows, float* target) {
    if (in_units(p)) return {reinterpret_cast<const float*>(p.a + row * p.a_stride + k), p.a_stride / 2};
    const std::int64_t stride = packed_stride(inner);
    if (p.transposed)
        pack_columns<bf16, Unit>(p.a + k * p.a_stride + row, p.a_stride, inner, 2 * stride, rows, target, stride,
                                 round_to(rows, W));
    else
        pack_rows<bf16, Unit>(p.a + row * p.a_stride + k, p.a_stride, rows, inner, target, stride, stride);
    return {target, stride};
}

// All of A from row `k` of K on against some panels of B.
template <class B, class C>
void multiply(const Product& p, std::int64_t k, std::int64_t inner, std::int64_t first, std::int64_t count, bool add) {
    const std::int64_t floats = units_of<Unit>(inner) * PANEL, column = first * PANEL;
    auto* packed = static_cast<float*>(workspace(Slot::shared, count * floats * sizeof(float)));
    const std::int64_t left = p.columns - column, columns = left < count * PANEL ? left : count * PANEL;
    const PackedMatrix w{packed, columns, inner, DType::bfloat16, false, nullptr, nullptr, 0};
    const int threads = product_team(p.threads, p.rows * columns * inner);
    Division cut = divide(p.rows, threads, w);
    if (threads == 1) {
        // Nobody waits for anybody: all strips but the last may be whole.
        cut.row_step = round_to(cut.row_step, STRIP);
        cut.row_tasks = (p.rows + cut.row_step - 1) / cut.row_step;
    }
    const std::int64_t sums = product_scratch(cut.row_step);
    const std::int64_t own = in_units(p) ? 0 : round_to(cut.row_step, W) * packed_stride(inner);
    const TeamScratch scratch = team_scratch(threads, sums + own);
    const bool whole_sums = inner == p.inner && !add && p.bias == nullptr;
    const bool past_caches = whole_sums && p.transposed && p.rows * p.columns >= LARGE_GRADIENT;
    const StoreSums<C> whole{static_cast<C*>(p.c) + column, p.c_stride, p.bias == nullptr ? nullptr : p.bias + column,
                             add, past_caches};

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t n = 0; n < count; ++n) pack_panel<B>(p, k, inner, first + n, packed + n * floats);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < cut.row_tasks * cut.column_tasks; ++task) {
            const std::int64_t row = task / cut.column_tasks * cut.row_step;
            const int part = static_cast<int>(task % cut.column_tasks), parts = static_cast<int>(cut.column_tasks);
            const std::int64_t rows = p.rows - row < cut.row_step ? p.rows - row : cut.row_step;
            float* mine = scratch.mine();
            const RowsOfA a = rows_of_a(p, k, inner, row, rows, mine + sums);
            StoreSums<C> to = whole;
            to.c += row * p.c_stride;
            product<Unit>(a.data, a.stride, rows, w, block_start(count, parts, part),
                          block_start(count, parts, part + 1), mine, to);
        }
        // What went past the caches is there for whoever waits for this thread.
        _mm_sfence();
    }
}

template <class B, class C>
void run(const Product& p) {
    const std::int64_t depth = p.transposed ? DEEPEST : p.inner;
    for (std::int64_t k = 0; k < p.inner; k += depth) {
        const std::int64_t inner = p.inner - k < depth ? p.inner - k : depth;
        const std::int64_t panels = (p.columns + PANEL - 1) / PANEL;
        const std::int64_t bytes = units_of<Unit>(inner) * PANEL * static_cast<std::int64_t>(sizeof(float));
        const std::int64_t together = bytes < PACKED_AT_ONCE ? PACKED_AT_ONCE / bytes : 1;
        for (std::int64_t first = 0; first < panels; first += together)
            multiply<B, C>(p, k, inner, first, panels - first < together ? panels - first : together, p.add || k > 0);
    }
}

}  // namespace

void product(const Product& p) {
    const bool wide = p.b_dtype == DType::float32;
    if (p.c_dtype == DType::float32)
        wide ? run<float, float>(p) : run<bf16, float>(p);
    else
        wide ? run<float, bf16>(p) : run<bf16, bf16>(p);
}

}  // namespace pyxlbert::PYXLBERT_LEVEL

#endif
