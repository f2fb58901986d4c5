// y = LN(residual + dropout(x + x_bias)), forward and backward, one pass over memory.
//
// Forward walks a row as layer_norm does; the first walk forms the sum as well, and the sum stays in float32
// until y is written, whatever the dtypes.  A copy of y in another dtype is narrowed from the same row while it
// is in L1.
//
// Backward, with s the saved sum, xhat = (s - mean) * rstd, dy the sum of both outputs' gradients, g = dy * weight:
//     ds = rstd * (g - mean_j(g) - xhat * mean_j(g * xhat)),  dresidual = ds,  dx = dropout's mask on ds,
//     dweight = sum_i dy * xhat,  dbias = sum_i dy,  dx_bias = sum_i dx.
#include "dropout_add_layer_norm.h"

#include "philox.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// for_vectors with the dropout words of each vector: step(j, count, word).  Four vectors share one draw.
template <class F>
PYXLBERT_INLINE void for_dropout_vectors(const Dropout& dropout, std::int64_t row, std::int64_t n, F step) {
    const std::uint32_t low = static_cast<std::uint32_t>(row);
    const std::uint32_t high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(row) >> 32);
    VecU words[4];
    std::int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W) {
        dropout_words(dropout, static_cast<std::uint32_t>(j), low, high, words);
        step(j, W, words[0]);
        step(j + W, W, words[1]);
        step(j + 2 * W, W, words[2]);
        step(j + 3 * W, W, words[3]);
    }
    if (j == n) return;
    dropout_words(dropout, static_cast<std::uint32_t>(j), low, high, words);
    for (int k = 0; j < n; j += W, ++k) step(j, static_cast<int>(n - j < W ? n - j : W), words[k]);
}

// Calls function(T{}, R{}) with x's element type and the residual's, which is the same or float.
template <class F>
PYXLBERT_INLINE void with_types(DType dtype, DType residual_dtype, F function) {
    with_type(dtype, [&](auto type) {
        if (residual_dtype == dtype)
            function(type, type);
        else
            function(type, float{});
    });
}

PYXLBERT_INLINE Dropout dropout_of(double p, const std::int64_t* seed) {
    return make_dropout(seed != nullptr ? p : 0.0, seed != nullptr ? *seed : 0, Tag::dropout_add_layer_norm);
}

template <class T, class R>
void forward(const DropoutAddLayerNormFwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    float* parameters = static_cast<float*>(workspace(Slot::shared, 3 * padded * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, parameters);
    const float* bias = as_float(a.bias, a.bias_dtype, n, parameters + padded);
    const float* x_bias =
        a.x_bias != nullptr ? as_float(a.x_bias, a.x_bias_dtype, n, parameters + 2 * padded) : nullptr;
    const Dropout dropout = dropout_of(a.dropout_p, a.seed);
    const TeamScratch scratch_rows = team_scratch(team(a.threads, a.rows * n), padded);

    in_team(scratch_rows.threads, [&](int thread, int threads) PYXLBERT_WORK {
        float* row = scratch_rows.of(thread);
        const std::int64_t end = block_start(a.rows, threads, thread + 1);
        for (std::int64_t i = block_start(a.rows, threads, thread); i < end; ++i) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            const R* residual = static_cast<const R*>(a.residual) + i * a.residual_stride;
            R* y = static_cast<R*>(a.y) + i * n;
            Vec total = zero();
            const auto branch = [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
                const Vec v = load_some(x + j, count);
                return x_bias != nullptr ? v + load_some(x_bias + j, count) : v;
            };
            const auto add = [&](std::int64_t j, int count, Vec v) PYXLBERT_LAMBDA {
                const Vec s = v + load_some(residual + j, count);
                store(row + j, s);
                total += s;
            };
            if (dropout.active) {
                for_dropout_vectors(dropout, i, n, [&](std::int64_t j, int count, VecU word) PYXLBERT_LAMBDA {
                    add(j, count, drop(dropout, word, branch(j, count)));
                });
            } else {
                for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { add(j, count, branch(j, count)); });
            }
            const auto [mean, rstd] = statistics(row, n, total, a.eps);
            if (a.sum != nullptr) {
                R* sum = static_cast<R*>(a.sum) + i * n;
                narrow_row(row, sum, n);
                Statistics saved = {mean, rstd};
                // Backward sees the rounded sum: with the mean of another row a constant one would deviate from it.
                if (sizeof(R) < sizeof(float)) {
                    Vec stored = zero();
                    for_vectors(
                        n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { stored += load_some(sum + j, count); });
                    saved = statistics(sum, n, stored, a.eps);
                }
                a.mean[i] = saved.mean;
                a.rstd[i] = saved.rstd;
            }
            const bool copied = a.y_copy != nullptr;
            normalised(row, n, mean, rstd, weight, bias, [&](std::int64_t j, int count, Vec v) PYXLBERT_LAMBDA {
                store_some(y + j, v, count);
                if (copied) store(row + j, v);
            });
            if (copied) {
                with_type(a.copy_dtype,
                          [&](auto type) { narrow_row(row, static_cast<decltype(type)*>(a.y_copy) + i * n, n); });
            }
        }
    });
}

// The gradient of one row of y: dy alone in place if it is float32, else widened, or added to the copy's, in scratch.
template <class R>
PYXLBERT_INLINE const float* row_gradient(const DropoutAddLayerNormBwd& a, std::int64_t i, float* scratch) {
    const R* dy = static_cast<const R*>(a.dy) + (a.dy != nullptr ? i * a.dy_stride : 0);
    if (a.dy_copy == nullptr) return as_float(dy, a.residual_dtype, a.columns, scratch);
    with_type(a.copy_dtype, [&](auto type) {
        const auto* dy_copy = static_cast<const decltype(type)*>(a.dy_copy) + i * a.dy_copy_stride;
        for_vectors(a.columns, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
            const Vec v = load_some(dy_copy + j, count);
            store(scratch + j, a.dy != nullptr ? v + load_some(dy + j, count) : v);
        });
    });
    return scratch;
}

template <class T, class R>
void backward(const DropoutAddLayerNormBwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    const int blocks = row_blocks(a.rows);
    const bool sums = a.dweight != nullptr || a.dbias != nullptr;
    const bool inputs = a.dx != nullptr || a.dresidual != nullptr || a.dx_bias != nullptr;
    const bool column_sums = sums || a.dx_bias != nullptr;
    // weight as floats, then dweight, dbias and dx_bias of every block of rows.
    const std::int64_t partial_stride = 3 * padded;
    float* shared = static_cast<float*>(
        workspace(Slot::shared, (padded + (column_sums ? blocks * partial_stride : 0)) * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, shared);
    float* partial = shared + padded;
    const Dropout dropout = dropout_of(a.dropout_p, a.seed);
    const TeamScratch scratch_rows =
        team_scratch(team(a.threads, a.rows * n), 3 * padded + RowSums::room(partial_stride));

#pragma omp parallel num_threads(scratch_rows.threads)
    {
        float* xhat = scratch_rows.mine();
        float* gradient = xhat + padded;
        float* scratch = xhat + 2 * padded;
#pragma omp for schedule(static)
        for (int b = 0; b < blocks; ++b) {
            const std::int64_t first = block_start(a.rows, blocks, b), end = block_start(a.rows, blocks, b + 1);
            RowSums rows(partial + b * partial_stride, scratch + padded, column_sums ? partial_stride : 0, end - first);
            float *dweight = rows.run, *dbias = dweight + padded, *dx_bias = dbias + padded;
            for (std::int64_t i = first; i < end; ++i, rows.next_row()) {
                const R* s = static_cast<const R*>(a.sum) + i * n;
                const float* dy = row_gradient<R>(a, i, scratch);
                RowGradient g = {set1(a.mean[i]), set1(a.rstd[i]), xhat, gradient, zero(), zero()};
                g.walk(
                    n, weight, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { return load_some(s + j, count); },
                    [&](std::int64_t j, int count) PYXLBERT_LAMBDA { return load_some(dy + j, count); }, sums, dweight,
                    dbias);
                if (!inputs) continue;
                T* dx = static_cast<T*>(a.dx) + (a.dx != nullptr ? i * n : 0);
                R* dresidual = static_cast<R*>(a.dresidual) + (a.dresidual != nullptr ? i * n : 0);
                const auto ds = [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
                    const Vec v = g.dx(j);
                    if (a.dresidual != nullptr) store_some(dresidual + j, v, count);
                    return v;
                };
                const auto branch = [&](std::int64_t j, int count, Vec v) PYXLBERT_LAMBDA {
                    if (a.dx != nullptr) store_some(dx + j, v, count);
                    // dx_bias's lanes past the row gather what nobody reads.
                    if (a.dx_bias != nullptr) store(dx_bias + j, load(dx_bias + j) + v);
                };
                if (dropout.active) {
                    for_dropout_vectors(dropout, i, n, [&](std::int64_t j, int count, VecU word) PYXLBERT_LAMBDA {
                        branch(j, count, drop(dropout, word, ds(j, count)));
                    });
                } else {
                    for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { branch(j, count, ds(j, count)); });
                }
            }
            rows.finish();
        }
    }
    if (!column_sums) return;
    add_blocks(partial, blocks, partial_stride, partial_stride);
    if (a.dweight != nullptr) from_float(partial, a.dweight, a.weight_dtype, n);
    if (a.dbias != nullptr) from_float(partial + padded, a.dbias, a.bias_dtype, n);
    if (a.dx_bias != nullptr) from_float(partial + 2 * padded, a.dx_bias, a.x_bias_dtype, n);
}

}  // namespace

void dropout_add_layer_norm_fwd(const DropoutAddLayerNormFwd& arguments) {
    with_types(arguments.dtype, arguments.residual_dtype,
               [&](auto x, auto residual) { forward<decltype(x), decltype(residual)>(arguments); });
}

void dropout_add_layer_norm_bwd(const DropoutAddLayerNormBwd& arguments) {
    with_types(arguments.dtype, arguments.residual_dtype,
               [&](auto x, auto residual) { backward<decltype(x), decltype(residual)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
