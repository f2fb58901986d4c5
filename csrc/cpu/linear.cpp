// A matrix product for few rows, y = x weight^T + bias with gelu at will, where the time is that of reading the
// weight once.  The weight is read as it lies, in row order, and not packed: four of its rows meet up to six rows of x
// in registers, sixteen partial sums each, while the next four rows are on their way from memory.
//
// The vendor's library does better from some thirty rows on, where the arithmetic is what takes the time.
#include "linear.h"

#include "gelu.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Columns of y of one task, and columns (rows of the weight) that are summed at once.
constexpr int TASK_COLUMNS = 16, TOGETHER = 4;

// Rows of x that are summed at once: with AVX-512's 32 registers 6 x 4 sums, with 16 registers 2 x 4.
constexpr int MAX_ROWS = W == 16 ? 6 : 2;

// Elements of a row that are summed in one chain per lane.
constexpr std::int64_t LONGEST = 128 * W;

// out[i] = the sum of the lanes of v[i].
PYXLBERT_INLINE void sum_lanes(const Vec (&v)[TOGETHER], float* out) {
#if defined(__AVX512F__) || defined(__AVX2__)
    // Two rounds of pairwise sums leave the four sums of every 128 bits side by side.
#if defined(__AVX512F__)
    const Vec a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const Vec b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    const Vec wide =
        _mm512_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0)) + _mm512_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2));
    const __m256 half = _mm512_castps512_ps256(wide) + _mm512_extractf32x8_ps(wide, 1);
#else
    const Vec a = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
    const Vec b = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
    const __m256 half =
        _mm256_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0)) + _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2));
#endif
    _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    for (int i = 0; i < TOGETHER; ++i) out[i] = reduce_add(v[i]);
#endif
}

// sums[r * TASK_COLUMNS + i] = x row r . weight row i, for R rows of x and four of the weight.
template <int R, class T>
PYXLBERT_INLINE void dot(const float* x, std::int64_t x_stride, const T* const (&weight)[TOGETHER], std::int64_t inner,
                         const std::int64_t (&ahead)[TOGETHER], float* sums) {
    Vec sum[R][TOGETHER];
    float total[R][TOGETHER] = {}, lost[R][TOGETHER] = {};
    const auto step = [&](std::int64_t k, const Vec(&w)[TOGETHER], auto x_at) PYXLBERT_LAMBDA {
        for (int r = 0; r < R; ++r) {
            const Vec xr = x_at(x + r * x_stride + k);
            for (int i = 0; i < TOGETHER; ++i) sum[r][i] = fma(w[i], xr, sum[r][i]);
        }
    };
    for (std::int64_t k = 0; k < inner;) {
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < TOGETHER; ++i) sum[r][i] = zero();
        const std::int64_t end = inner - k < LONGEST ? inner : k + LONGEST;
        for (; k + W <= end; k += W) {
            Vec w[TOGETHER];
            for (int i = 0; i < TOGETHER; ++i) {
                // Past the weight's end this asks for memory that is not there, which does no harm.
                __builtin_prefetch(weight[i] + k + ahead[i]);
                w[i] = load(weight[i] + k);
            }
            step(k, w, [](const float* p) PYXLBERT_LAMBDA { return load(p); });
        }
        const int tail = static_cast<int>(end - k);
        if (tail) {
            Vec w[TOGETHER];
            for (int i = 0; i < TOGETHER; ++i) w[i] = load(weight[i] + k, tail);
            step(k, w, [tail](const float* p) PYXLBERT_LAMBDA { return load(p, tail); });
            k = end;
        }
        for (int r = 0; r < R; ++r) {
            float of_run[TOGETHER];
            sum_lanes(sum[r], of_run);
            for (int i = 0; i < TOGETHER; ++i) add_exactly(total[r][i], lost[r][i], of_run[i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < TOGETHER; ++i) sums[r * TASK_COLUMNS + i] = total[r][i];
}

template <class T>
PYXLBERT_INLINE void dot_rows(int rows, const float* x, std::int64_t x_stride, const T* const (&weight)[TOGETHER],
                              std::int64_t inner, const std::int64_t (&ahead)[TOGETHER], float* sums) {
    switch (rows) {
        case 1:
            return dot<1>(x, x_stride, weight, inner, ahead, sums);
        case 2:
            return dot<2>(x, x_stride, weight, inner, ahead, sums);
#if defined(__AVX512F__)
        case 3:
            return dot<3>(x, x_stride, weight, inner, ahead, sums);
        case 4:
            return dot<4>(x, x_stride, weight, inner, ahead, sums);
        case 5:
            return dot<5>(x, x_stride, weight, inner, ahead, sums);
        case 6:
            return dot<6>(x, x_stride, weight, inner, ahead, sums);
#endif
    }
}

template <class T, class Activation>
void forward(const LinearFwd& a, Activation activation) {
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    const float* x;
    std::int64_t x_stride = a.x_stride;
    if (a.dtype == DType::float32) {
        x = static_cast<const float*>(a.x);
    } else {
        x_stride = round_up(a.inner, W);
        float* wide = static_cast<float*>(workspace(Slot::shared, a.rows * x_stride * sizeof(float)));
        for (std::int64_t i = 0; i < a.rows; ++i)
            widen_row(static_cast<const T*>(a.x) + i * a.x_stride, wide + i * x_stride, a.inner);
        x = wide;
    }
    const int groups = static_cast<int>((a.rows + MAX_ROWS - 1) / MAX_ROWS);
    const std::int64_t tasks = (a.columns + TASK_COLUMNS - 1) / TASK_COLUMNS;
    const TeamScratch scratch = team_scratch(team(a.threads, a.columns * a.inner), a.rows * TASK_COLUMNS);

#pragma omp parallel for schedule(static) num_threads(scratch.threads)
    for (std::int64_t task = 0; task < tasks; ++task) {
        const std::int64_t first = task * TASK_COLUMNS;
        const int columns = static_cast<int>(a.columns - first < TASK_COLUMNS ? a.columns - first : TASK_COLUMNS);
        float* sums = scratch.mine();
        for (int n = 0; n < columns; n += TOGETHER) {
            // Past the last row of the weight the last one stands in; its sums are not stored.
            const T* w[TOGETHER];
            for (int i = 0; i < TOGETHER; ++i) {
                const int row = n + i < columns ? n + i : columns - 1;
                w[i] = weight + (first + row) * a.inner;
            }
            for (int g = 0; g < groups; ++g) {
                const std::int64_t start = block_start(a.rows, groups, g);
                const int rows = static_cast<int>(block_start(a.rows, groups, g + 1) - start);
                // Each group of rows asks for its share of the next four rows of the weight, so that memory is never
                // idle.
                std::int64_t ahead[TOGETHER];
                for (int i = 0; i < TOGETHER; ++i) ahead[i] = i % groups == g % TOGETHER ? TOGETHER * a.inner : 0;
                dot_rows(rows, x + start * x_stride, x_stride, w, a.inner, ahead, sums + start * TASK_COLUMNS + n);
            }
        }
        for (std::int64_t i = 0; i < a.rows; ++i) {
            T* y = static_cast<T*>(a.y) + i * a.columns + first;
            for (int n = 0; n < columns; n += W) {
                Vec z = load(sums + i * TASK_COLUMNS + n);
                if (bias != nullptr) z = z + load(bias + first + n, columns - n);
                store(y + n, activation(z), columns - n);
            }
        }
    }
}

}  // namespace

void linear_fwd(const LinearFwd& arguments) {
    with_type(arguments.dtype, [&](auto type) {
        using T = decltype(type);
        if (!arguments.gelu)
            forward<T>(arguments, [](Vec z) PYXLBERT_LAMBDA { return z; });
        else if (arguments.tanh)
            forward<T>(arguments, [](Vec z) PYXLBERT_LAMBDA { return Tanh::value(z); });
        else
            forward<T>(arguments, [](Vec z) PYXLBERT_LAMBDA { return Erf::value(z); });
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
