// layer_norm: a row is read once, its mean and then the squares of what is left are summed in registers.
//
//     x      [M, N]  ->  mean, rstd  ->  y
//     dy, x  [M, N]  ->  dx of the row; dy * xhat and dy are added up over the block's rows, and launch_sum_parts adds
//                        up the blocks' sums
#include "cuda/layer_norm.h"

#include "cuda/rows.cuh"

namespace pyxlbert::cuda {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(S::BLOCK, 1) layer_norm_fwd(const LayerNormFwd a) {
    const int columns = static_cast<int>(a.columns);
    each_row<S>(a.rows, S::ROWS, [&](std::int64_t row, bool there) {
        float x[S::VECTORS][S::VEC];
        zero<S>(x);
        const T* source = static_cast<const T*>(a.x.data) + row * a.x.stride;
        if (there) each_vector<S>(columns, [&](int v, int column) { load<S::VEC>(source + column, x[v]); });
        const Statistics s = centre<S>(x, columns, a.eps);
        if (!there) return;
        T* y = static_cast<T*>(a.y) + row * a.columns;
        each_vector<S>(columns, [&](int v, int column) {
            float w[S::VEC], b[S::VEC];
            load<S::VEC>(a.weight, column, w);
            load<S::VEC>(a.bias, column, b);
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) x[v][e] = x[v][e] * s.rstd * w[e] + b[e];
            store<S::VEC>(y + column, x[v]);
        });
        if (a.mean != nullptr && threadIdx.x % S::THREADS == 0) {
            a.mean[row] = s.mean;
            a.rstd[row] = s.rstd;
        }
    });
}

template <class T, class S>
__global__ void __launch_bounds__(S::BLOCK, 1) layer_norm_bwd(const LayerNormBwd a) {
    const int columns = static_cast<int>(a.columns);
    float dweight[S::VECTORS][S::VEC], dbias[S::VECTORS][S::VEC];
    zero<S>(dweight);
    zero<S>(dbias);
    each_row<S>(a.rows, a.each, [&](std::int64_t row, bool there) {
        float g[S::VECTORS][S::VEC], xhat[S::VECTORS][S::VEC];
        zero<S>(g);
        zero<S>(xhat);
        float mean = 0.0f, rstd = 0.0f;
        if (there) {
            mean = a.mean[row];
            rstd = a.rstd[row];
            const T* dy = static_cast<const T*>(a.dy.data) + row * a.dy.stride;
            const T* x = static_cast<const T*>(a.x.data) + row * a.x.stride;
            each_vector<S>(columns, [&](int v, int column) {
                load<S::VEC>(dy + column, g[v]);
                load<S::VEC>(x + column, xhat[v]);
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
        T* dx = static_cast<T*>(a.dx) + row * a.columns;
        each_vector<S>(columns, [&](int v, int column) { store<S::VEC>(dx + column, g[v]); });
    });
    if (a.partial != nullptr) {
        store_sum<S>(a.partial, dweight, columns);
        if (S::ROWS > 1) __syncthreads();
        store_sum<S>(a.partial + a.parts * a.columns, dbias, columns);
    }
}

}  // namespace

void launch_layer_norm_fwd(const LayerNormFwd& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) {
        using T = decltype(kind);
        constexpr int VEC = 16 / sizeof(T);
        const bool vectors = a.columns % VEC == 0 && rows_aligned<VEC>(a.x) && aligned(a.weight.data, a.bias.data, a.y);
        with_shape<VEC>(vectors, a.columns, [&](auto shape) {
            using S = decltype(shape);
            launch<layer_norm_fwd<T, S>, S::SHARED>(blocks_of(a.rows, S::ROWS), S::BLOCK, stream, a);
        });
    });
}

void launch_layer_norm_bwd(const LayerNormBwd& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) {
        using T = decltype(kind);
        constexpr int VEC = 16 / sizeof(T);
        const bool vectors = a.columns % VEC == 0 && rows_aligned<VEC>(a.dy) && rows_aligned<VEC>(a.x) &&
                             aligned(a.weight.data, a.dx, a.partial);
        with_shape<VEC>(vectors, a.columns, [&](auto shape) {
            using S = decltype(shape);
            launch<layer_norm_bwd<T, S>, S::SHARED_FOR_SUMS>(blocks_of(a.rows, a.each), S::BLOCK, stream, a);
        });
    });
    PartSums sums;
    sums.add_both(a.partial, a.parts * a.columns, a.dweight, a.dbias);
    launch_sum_parts(sums, a.parts, a.columns, stream);
}

}  // namespace pyxlbert::cuda
