// LayerNorm over the last dimension, forward and backward.
//
// Forward walks a row three times, but only the first walk leaves the cache: it widens the row to a
// float buffer and sums it; the second sums the squared deviations (two passes: E[x^2] - mean^2 cancels
// when the mean is large); the third normalises.  The buffer of one row stays in L1.
//
// Backward, with xhat = (x - mean) * rstd and g = dy * weight:
//     dx = rstd * (g - mean_j(g) - xhat * mean_j(g * xhat)),  dweight = sum_i dy * xhat,  dbias = sum_i dy.
#include "layer_norm.h"

#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

template <class T>
void forward(const LayerNormFwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    float* parameters = static_cast<float*>(workspace(Slot::shared, 2 * padded * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, parameters);
    const float* bias = as_float(a.bias, a.bias_dtype, n, parameters + padded);
    const float inverse_n = 1.0f / static_cast<float>(n);
    const int tail = static_cast<int>(n % W);
    const std::int64_t body = n - tail;

#pragma omp parallel num_threads(team(a.threads, a.rows* n))
    {
        float* row = static_cast<float*>(workspace(Slot::row, padded * sizeof(float)));
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < a.rows; ++i) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            T* y = static_cast<T*>(a.y) + i * n;
            Vec sum = zero();
            for (std::int64_t j = 0; j < body; j += W) {
                const Vec v = load(x + j);
                store(row + j, v);
                sum += v;
            }
            if (tail) {
                const Vec v = load(x + body, tail);
                store(row + body, v);
                sum += v;
            }
            const float mean = reduce_add(sum) * inverse_n;
            Vec squares = zero();
            for (std::int64_t j = 0; j < body; j += W) {
                const Vec d = load(row + j) - set1(mean);
                squares = fma(d, d, squares);
            }
            if (tail) {
                // The lanes past the row hold zero, whose deviation must not count.
                const Vec d = keep_first(load(row + body) - set1(mean), tail);
                squares = fma(d, d, squares);
            }
            const float rstd = 1.0f / sqrt(reduce_add(squares) * inverse_n + a.eps);
            for (std::int64_t j = 0; j < body; j += W)
                store(y + j, fma((load(row + j) - set1(mean)) * set1(rstd), load(weight + j), load(bias + j)));
            if (tail)
                store(y + body,
                      fma((load(row + body) - set1(mean)) * set1(rstd), load(weight + body, tail),
                          load(bias + body, tail)),
                      tail);
            if (a.mean != nullptr) {
                a.mean[i] = mean;
                a.rstd[i] = rstd;
            }
        }
    }
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
    const float inverse_n = 1.0f / static_cast<float>(n);
    if (sums)
        for (std::int64_t j = 0; j < partial_stride; j += W) store(partial + j, zero());

#pragma omp parallel num_threads(team(a.threads, a.rows* n))
    {
        float* xhat = static_cast<float*>(workspace(Slot::row, 2 * padded * sizeof(float)));
        float* gradient = xhat + padded;
#pragma omp for schedule(static)
        for (int b = 0; b < blocks; ++b) {
            float* dweight = partial + b * partial_stride;
            float* dbias = dweight + padded;
            if (sums)
                for (std::int64_t j = 0; j < partial_stride; j += W) store(dweight + j, zero());
            for (std::int64_t i = block_start(a.rows, blocks, b); i < block_start(a.rows, blocks, b + 1); ++i) {
                const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
                const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
                T* dx = static_cast<T*>(a.dx) + i * n;
                const Vec mean = set1(a.mean[i]), rstd = set1(a.rstd[i]);
                Vec sum = zero(), dot = zero();
                // dy is zero in the lanes past the row, so those lanes add nothing to any sum.
                const auto step = [&](std::int64_t j, Vec xj, Vec dyj, Vec weightj) PYXLBERT_LAMBDA {
                    const Vec h = (xj - mean) * rstd;
                    const Vec g = dyj * weightj;
                    store(xhat + j, h);
                    store(gradient + j, g);
                    sum += g;
                    dot = fma(g, h, dot);
                    if (sums) {
                        store(dweight + j, fma(dyj, h, load(dweight + j)));
                        store(dbias + j, load(dbias + j) + dyj);
                    }
                };
                std::int64_t j = 0;
                for (; j + W <= n; j += W) step(j, load(x + j), load(dy + j), load(weight + j));
                const int tail = static_cast<int>(n - j);
                if (tail) step(j, load(x + j, tail), load(dy + j, tail), load(weight + j, tail));
                const Vec mean_g = set1(reduce_add(sum) * inverse_n), mean_gh = set1(reduce_add(dot) * inverse_n);
                const auto result = [&](std::int64_t k) PYXLBERT_LAMBDA {
                    return rstd * (load(gradient + k) - mean_g - load(xhat + k) * mean_gh);
                };
                for (j = 0; j + W <= n; j += W) store(dx + j, result(j));
                if (tail) store(dx + j, result(j), tail);
            }
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
