// LayerNorm over the last dimension, forward and backward.
//
// Forward walks a row three times, but only the first walk leaves the cache: it sums the row, and widens one of 16 bits
// to a float buffer, which stays in L1 as a row of floats does; the second sums the deviations and their squares (two
// passes: E[x^2] - mean^2 cancels when the mean is large); the third normalises.
//
// Backward, with xhat = (x - mean) * rstd and g = dy * weight:
//     dx = rstd * (g - mean_j(g) - xhat * mean_j(g * xhat)),  dweight = sum_i dy * xhat,  dbias = sum_i dy.
#include "layer_norm.h"

#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// The sum of a row, in four chains: one would wait for every addition.  A row that is not of floats is widened to
// target.
template <class T>
PYXLBERT_INLINE Vec widened(const T* x, std::int64_t n, float* target) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    const auto add = [&](int k, std::int64_t j, int count) PYXLBERT_LAMBDA {
        const Vec v = load_some(x + j, count);
        if constexpr (sizeof(T) < sizeof(float)) store(target + j, v);
        sums[k] += v;
    };
    std::int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) add(k, j + k * W, W);
    for (int k = 0; j < n; j += W, ++k) add(k, j, n - j < W ? static_cast<int>(n - j) : W);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
void forward(const LayerNormFwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    float* parameters = static_cast<float*>(workspace(Slot::shared, 2 * padded * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, parameters);
    const float* bias = as_float(a.bias, a.bias_dtype, n, parameters + padded);
    const TeamScratch scratch_rows = team_scratch(team(a.threads, a.rows * n), padded);

    in_team(scratch_rows.threads, [&](int thread, int threads) PYXLBERT_WORK {
        float* row = scratch_rows.of(thread);
        const std::int64_t end = block_start(a.rows, threads, thread + 1);
        for (std::int64_t i = block_start(a.rows, threads, thread); i < end; ++i) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            T* y = static_cast<T*>(a.y) + i * n;
            const Vec sum = widened(x, n, row);
            const float* values = row;
            if constexpr (sizeof(T) == sizeof(float)) values = x;
            const auto [mean, rstd] = statistics(values, n, sum, a.eps);
            normalised(values, n, mean, rstd, weight, bias,
                       [&](std::int64_t j, int count, Vec v) PYXLBERT_LAMBDA { store_some(y + j, v, count); });
            if (a.mean != nullptr) {
                a.mean[i] = mean;
                a.rstd[i] = rstd;
            }
        }
    });
}

template <class T>
void backward(const LayerNormBwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    const int blocks = row_blocks(a.rows);
    const bool sums = a.dweight != nullptr || a.dbias != nullptr;
    // weight as floats, then dweight and dbias of every block of rows.
    const std::int64_t partial_stride = 2 * padded;
    float* shared = static_cast<float*>(
        workspace(Slot::shared, (padded + (sums ? (blocks > 0 ? blocks : 1) * partial_stride : 0)) * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, shared);
    float* partial = shared + padded;
    if (sums)
        for (std::int64_t j = 0; j < partial_stride; j += W) store(partial + j, zero());
    const TeamScratch scratch_rows =
        team_scratch(team(a.threads, a.rows * n), 2 * padded + RowSums::room(partial_stride));

#pragma omp parallel num_threads(scratch_rows.threads)
    {
        float* xhat = scratch_rows.mine();
        float* gradient = xhat + padded;
#pragma omp for schedule(static)
        for (int b = 0; b < blocks; ++b) {
            const std::int64_t first = block_start(a.rows, blocks, b), end = block_start(a.rows, blocks, b + 1);
            RowSums rows(partial + b * partial_stride, gradient + padded, sums ? partial_stride : 0, end - first);
            float *dweight = rows.run, *dbias = dweight + padded;
            for (std::int64_t i = first; i < end; ++i) {
                const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
                const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
                T* dx = static_cast<T*>(a.dx) + i * n;
                RowGradient g = {set1(a.mean[i]), set1(a.rstd[i]), xhat, gradient, zero(), zero()};
                g.walk(
                    n, weight, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { return load_some(x + j, count); },
                    [&](std::int64_t j, int count) PYXLBERT_LAMBDA { return load_some(dy + j, count); }, sums, dweight,
                    dbias);
                for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { store_some(dx + j, g.dx(j), count); });
                rows.next_row();
            }
            rows.finish();
        }
    }
    if (!sums) return;
    add_blocks(partial, blocks, partial_stride, partial_stride);
    if (a.dweight != nullptr) from_float(partial, a.dweight, a.weight_dtype, n);
    if (a.dbias != nullptr) from_float(partial + padded, a.dbias, a.bias_dtype, n);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& arguments) {
    with_type(arguments.dtype, [&](auto type) { forward<decltype(type)>(arguments); });
}

void layer_norm_bwd(const LayerNormBwd& arguments) {
    with_type(arguments.dtype, [&](auto type) { backward<decltype(type)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
