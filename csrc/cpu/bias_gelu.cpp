// gelu(x + bias), forward and backward, one pass over memory; the formulas are in gelu.h.
#include "bias_gelu.h"

#include "gelu.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Columns of one task of the forward pass: long single rows are shared out too.
constexpr std::int64_t COLUMN_BLOCK = 4096;

template <class T, class Gelu>
void forward(const BiasGeluFwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    const float* bias = nullptr;
    if (a.bias != nullptr)
        bias = as_float(a.bias, a.bias_dtype, n, static_cast<float*>(workspace(Slot::shared, padded * sizeof(float))));
    const std::int64_t blocks = (n + COLUMN_BLOCK - 1) / COLUMN_BLOCK;

    in_team(team(a.threads, a.rows * n * 4), [&](int thread, int threads) PYXLBERT_WORK {
        const std::int64_t last = block_start(a.rows * blocks, threads, thread + 1);
        for (std::int64_t task = block_start(a.rows * blocks, threads, thread); task < last; ++task) {
            const std::int64_t i = task / blocks, block = task % blocks;
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            T* y = static_cast<T*>(a.y) + i * n;
            std::int64_t j = block * COLUMN_BLOCK;
            const std::int64_t end = j + COLUMN_BLOCK < n ? j + COLUMN_BLOCK : n;
            for (; j + W <= end; j += W) {
                const Vec z = load(x + j);
                store(y + j, Gelu::value(bias != nullptr ? z + load(bias + j) : z));
            }
            const int tail = static_cast<int>(end - j);
            if (tail) {
                const Vec z = load(x + j, tail);
                store(y + j, Gelu::value(bias != nullptr ? z + load(bias + j, tail) : z), tail);
            }
        }
    });
}

template <class T, class Gelu>
void backward(const BiasGeluBwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    const int blocks = row_blocks(a.rows);
    const bool sums = a.dbias != nullptr;
    // bias as floats, then dbias of every block of rows.
    float* shared = static_cast<float*>(workspace(Slot::shared, padded * (1 + (sums ? blocks : 0)) * sizeof(float)));
    const float* bias = a.bias != nullptr ? as_float(a.bias, a.bias_dtype, n, shared) : nullptr;
    float* partial = shared + padded;
    const TeamScratch scratch = team_scratch(team(a.threads, a.rows * n * 4), RowSums::room(padded));

#pragma omp parallel for schedule(static) num_threads(scratch.threads)
    for (int b = 0; b < blocks; ++b) {
        const std::int64_t first = block_start(a.rows, blocks, b), end = block_start(a.rows, blocks, b + 1);
        RowSums rows(partial + b * padded, scratch.mine(), sums ? padded : 0, end - first);
        float* dbias = rows.run;
        for (std::int64_t i = first; i < end; ++i) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
            T* dx = static_cast<T*>(a.dx) + i * n;
            // dy is zero in the lanes past the row, so those lanes add nothing to the sum.
            const auto step = [&](std::int64_t j, Vec z, Vec dyj) PYXLBERT_LAMBDA {
                const Vec d = dyj * Gelu::slope(z);
                if (sums) store(dbias + j, load(dbias + j) + d);
                return d;
            };
            std::int64_t j = 0;
            for (; j + W <= n; j += W) {
                const Vec z = load(x + j);
                store(dx + j, step(j, bias != nullptr ? z + load(bias + j) : z, load(dy + j)));
            }
            const int tail = static_cast<int>(n - j);
            if (tail) {
                const Vec z = load(x + j, tail);
                store(dx + j, step(j, bias != nullptr ? z + load(bias + j, tail) : z, load(dy + j, tail)), tail);
            }
            rows.next_row();
        }
        rows.finish();
    }
    if (!sums) return;
    add_blocks(partial, blocks, padded, padded);
    from_float(partial, a.dbias, a.bias_dtype, n);
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& arguments) {
    with_type(arguments.dtype, [&](auto type) {
        arguments.tanh ? forward<decltype(type), Tanh>(arguments) : forward<decltype(type), Erf>(arguments);
    });
}

void bias_gelu_bwd(const BiasGeluBwd& arguments) {
    with_type(arguments.dtype, [&](auto type) {
        arguments.tanh ? backward<decltype(type), Tanh>(arguments) : backward<decltype(type), Erf>(arguments);
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
