// dropout_add_layer_norm: one pass each way.
//
//     x, residual [M, N]  ->  s = residual + dropout(x + x_bias), rounded only where it is stored  ->  y, its copy
//     dy, s       [M, N]  ->  ds; dresidual = ds, dx = dropout's mask on ds; the sums over a block's rows of dy * xhat,
//                             dy and dx, which launch_sum_parts adds up
//
// Backward draws dropout's bits again.
#include "cuda/dropout_add_layer_norm.h"

#include "cuda/philox.cuh"
#include "cuda/rows.cuh"

namespace pyxlbert::cuda {
namespace {

constexpr Tag TAG = Tag::dropout_add_layer_norm;

// The element types of x and of the residual stream.
template <class T_, class R_>
struct Types {
    using T = T_;
    using R = R_;
    static constexpr int VEC = 16 / sizeof(T);
};

template <class F>
void with_types(DType dtype, DType residual, F f) {
    with_type(dtype, [&](auto kind) {
        using T = decltype(kind);
        if (residual == DType::float32)
            f(Types<T, float>());
        else
            f(Types<T, T>());
    });
}

template <class K, class S>
__global__ void __launch_bounds__(S::BLOCK, 1)
    dropout_add_layer_norm_fwd(const DropoutAddLayerNormFwd a, const Dropout dropout) {
    using T = typename K::T;
    using R = typename K::R;
    const int columns = static_cast<int>(a.columns);
    const std::uint64_t seed = dropout.seed == nullptr ? 0 : static_cast<std::uint64_t>(*dropout.seed);
    each_row<S>(a.rows, S::ROWS, [&](std::int64_t row, bool there) {
        float x[S::VECTORS][S::VEC];
        zero<S>(x);
        if (there) {
            const T* branch = static_cast<const T*>(a.x.data) + row * a.x.stride;
            const R* residual = static_cast<const R*>(a.residual.data) + row * a.residual.stride;
            each_vector<S>(columns, [&](int v, int column) {
                float more[S::VEC];
                load<S::VEC>(branch + column, x[v]);
                if (a.x_bias.data != nullptr) {
                    load<S::VEC>(a.x_bias, column, more);
#pragma unroll
                    for (int e = 0; e < S::VEC; ++e) x[v][e] += more[e];
                }
                if (dropout.seed != nullptr) drop<S::VEC>(dropout, seed, row, column, TAG, x[v]);
                load<S::VEC>(residual + column, more);
#pragma unroll
                for (int e = 0; e < S::VEC; ++e) x[v][e] += more[e];
            });
        }
        if (a.s != nullptr) {
            // What backward sees is what is stored.
            float stored[S::VECTORS][S::VEC];
            R* target = static_cast<R*>(a.s) + row * a.columns;
#pragma unroll
            for (int v = 0; v < S::VECTORS; ++v)
#pragma unroll
                for (int e = 0; e < S::VEC; ++e) stored[v][e] = to_float(from_float<R>(x[v][e]));
            if (there) each_vector<S>(columns, [&](int v, int column) { store<S::VEC>(target + column, x[v]); });
            const Statistics s = centre<S>(stored, columns, a.eps);
            if (there && threadIdx.x % S::THREADS == 0) {
                a.mean[row] = s.mean;
                a.rstd[row] = s.rstd;
            }
        }
        const Statistics s = centre<S>(x, columns, a.eps);
        if (!there) return;
        R* y = static_cast<R*>(a.y) + row * a.columns;
        each_vector<S>(columns, [&](int v, int column) {
            float w[S::VEC], b[S::VEC];
            load<S::VEC>(a.weight, column, w);
            load<S::VEC>(a.bias, column, b);
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) x[v][e] = x[v][e] * s.rstd * w[e] + b[e];
            store<S::VEC>(y + column, x[v]);
            if (a.copy != nullptr) store_any<S::VEC>(a.copy, a.copy_dtype, row * a.columns + column, x[v]);
        });
    });
}

template <class K, class S>
__global__ void __launch_bounds__(S::BLOCK, 1)
    dropout_add_layer_norm_bwd(const DropoutAddLayerNormBwd a, const Dropout dropout) {
    using T = typename K::T;
    using R = typename K::R;
    const int columns = static_cast<int>(a.columns);
    const std::uint64_t seed = dropout.seed == nullptr ? 0 : static_cast<std::uint64_t>(*dropout.seed);
    float dweight[S::VECTORS][S::VEC], dbias[S::VECTORS][S::VEC], dx_bias[S::VECTORS][S::VEC];
    zero<S>(dweight);
    zero<S>(dbias);
    zero<S>(dx_bias);
    each_row<S>(a.rows, a.each, [&](std::int64_t row, bool there) {
        float g[S::VECTORS][S::VEC], xhat[S::VECTORS][S::VEC];
        zero<S>(g);
        zero<S>(xhat);
        const std::int64_t first = row * a.columns;
        float rstd = 0.0f;
        if (there) {
            const float mean = a.mean[row];
            rstd = a.rstd[row];
            const R* s = static_cast<const R*>(a.s) + first;
            each_vector<S>(columns, [&](int v, int column) {
                if (a.dy.data != nullptr)
                    load<S::VEC>(static_cast<const R*>(a.dy.data) + row * a.dy.stride + column, g[v]);
                if (a.dy_copy.data != nullptr) {
                    float more[S::VEC];
                    load_any<S::VEC>(a.dy_copy.data, a.copy_dtype, row * a.dy_copy.stride + column, more);
#pragma unroll
                    for (int e = 0; e < S::VEC; ++e) g[v][e] += more[e];
                }
                load<S::VEC>(s + column, xhat[v]);
            });
            each_vector<S>(columns, [&](int v, int) {
#pragma unroll
                for (int e = 0; e < S::VEC; ++e) {
                    xhat[v][e] = (xhat[v][e] - mean) * rstd;
                    dweight[v][e] += g[v][e] * xhat[v][e];
                    dbias[v][e] += g[v][e];
                }
            });
        }
        input_gradient<S>(g, xhat, a.weight, rstd, columns);
        if (!there) return;
        each_vector<S>(columns, [&](int v, int column) {
            if (a.dresidual != nullptr) store<S::VEC>(static_cast<R*>(a.dresidual) + first + column, g[v]);
            if (dropout.seed != nullptr) drop<S::VEC>(dropout, seed, row, column, TAG, g[v]);
            if (a.dx != nullptr) store<S::VEC>(static_cast<T*>(a.dx) + first + column, g[v]);
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) dx_bias[v][e] += g[v][e];
        });
    });
    if (a.partial != nullptr) {
        store_sum<S>(a.partial, dweight, columns);
        if (S::ROWS > 1) __syncthreads();
        store_sum<S>(a.partial + a.parts * a.columns, dbias, columns);
    }
    if (a.partial_bias != nullptr) {
        if (S::ROWS > 1) __syncthreads();
        store_sum<S>(a.partial_bias, dx_bias, columns);
    }
}

}  // namespace

void launch_dropout_add_layer_norm_fwd(const DropoutAddLayerNormFwd& a, CudaStream stream) {
    with_types(a.dtype, a.residual_dtype, [&](auto kind) {
        using K = decltype(kind);
        const bool vectors = a.columns % K::VEC == 0 && rows_aligned<K::VEC>(a.x) && rows_aligned<K::VEC>(a.residual) &&
                             aligned(a.x_bias.data, a.weight.data, a.bias.data, a.y, a.copy, a.s);
        with_shape<K::VEC>(vectors, a.columns, [&](auto shape) {
            using S = decltype(shape);
            launch<dropout_add_layer_norm_fwd<K, S>, S::SHARED>(blocks_of(a.rows, S::ROWS), S::BLOCK, stream, a,
                                                                make_dropout(a.dropout_p, a.seed));
        });
    });
}

void launch_dropout_add_layer_norm_bwd(const DropoutAddLayerNormBwd& a, CudaStream stream) {
    with_types(a.dtype, a.residual_dtype, [&](auto kind) {
        using K = decltype(kind);
        const bool vectors = a.columns % K::VEC == 0 && rows_aligned<K::VEC>(a.dy) && rows_aligned<K::VEC>(a.dy_copy) &&
                             aligned(a.s, a.weight.data, a.dx, a.dresidual, a.partial, a.partial_bias);
        with_shape<K::VEC>(vectors, a.columns, [&](auto shape) {
            using S = decltype(shape);
            launch<dropout_add_layer_norm_bwd<K, S>, S::SHARED_FOR_SUMS>(blocks_of(a.rows, a.each), S::BLOCK, stream, a,
                                                                         make_dropout(a.dropout_p, a.seed));
        });
    });
    PartSums sums;
    sums.add_both(a.partial, a.parts * a.columns, a.dweight, a.dbias);
    sums.add(a.partial_bias, a.dx_bias);
    launch_sum_parts(sums, a.parts, a.columns, stream);
}

}  // namespace pyxlbert::cuda
