// bias_gelu: a thread has VEC neighbouring columns and walks down some rows, so that it loads the bias once and adds up
// its gradient in registers; launch_sum_parts adds up the blocks' sums.
//
//     x [M, N] + bias [N]  ->  z  ->  z g(z), g the share that passes
//     dy, x    [M, N]      ->  dx = dy (g + z g')
//
// The exact gate is Phi(z) = erfc(-z / sqrt 2) / 2, which far below zero has digits where 1 + erf has none left.
#include "cuda/bias_gelu.h"

#include "cuda/rows.cuh"

namespace pyxlbert::cuda {
namespace {

// As in the reference: past it the gate is 0 or 1 and its slope 0.
constexpr float FAR = 50.0f;
constexpr int THREADS = 128;
constexpr std::int64_t EACH = 8;  // rows of a block forward: four loads under way, twice

struct Gate {
    float gate, slope;  // g(z) with gelu(z) = z g(z), and its derivative
};

template <bool TANH>
DEVICE Gate gate_of(float z) {
    const float near = z > FAR ? FAR : z;
    if constexpr (TANH) {
        constexpr float C = 1.5957691216057308f;  // sqrt(8 / pi)
        const float u = C * (near + 0.044715f * near * near * near);
        const float gate = 1.0f / (1.0f + expf(-u));
        return {gate, gate * (1.0f / (1.0f + expf(u))) * C * (1.0f + 0.134145f * near * near)};
    } else {
        return {0.5f * erfcf(near * -0.7071067811865476f), 0.3989422804014327f * expf(-0.5f * near * near)};
    }
}

// z = x + bias, not below -FAR, where an infinite one would be NaN times a gate of 0.
template <int VEC>
DEVICE void argument(float (&x)[VEC], const float (&bias)[VEC]) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        const float z = x[e] + bias[e];
        x[e] = z < -FAR ? -FAR : z;  // not a maximum, which would make a number of a NaN
    }
}

template <int VEC>
DEVICE void load_bias(const Parameter& bias, int column, float (&x)[VEC]) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) x[e] = 0.0f;
    if (bias.data != nullptr) load<VEC>(bias, column, x);
}

template <class T, int VEC, bool TANH>
__global__ void __launch_bounds__(THREADS) bias_gelu_fwd(const BiasGeluFwd a) {
    const int column = static_cast<int>(blockIdx.y * THREADS + threadIdx.x) * VEC;
    if (column >= a.columns) return;
    float bias[VEC];
    load_bias<VEC>(a.bias, column, bias);
    const std::int64_t first = blockIdx.x * EACH, end = first + EACH < a.rows ? first + EACH : a.rows;
#pragma unroll 4
    for (std::int64_t row = first; row < end; ++row) {
        float x[VEC];
        load<VEC>(static_cast<const T*>(a.x.data) + row * a.x.stride + column, x);
        argument<VEC>(x, bias);
#pragma unroll
        for (int e = 0; e < VEC; ++e) x[e] *= gate_of<TANH>(x[e]).gate;
        store<VEC>(static_cast<T*>(a.y) + row * a.columns + column, x);
    }
}

template <class T, int VEC, bool TANH>
__global__ void __launch_bounds__(THREADS) bias_gelu_bwd(const BiasGeluBwd a) {
    const int column = static_cast<int>(blockIdx.y * THREADS + threadIdx.x) * VEC;
    if (column >= a.columns) return;
    float bias[VEC], dbias[VEC];
    load_bias<VEC>(a.bias, column, bias);
#pragma unroll
    for (int e = 0; e < VEC; ++e) dbias[e] = 0.0f;
    const std::int64_t first = blockIdx.x * a.each, end = first + a.each < a.rows ? first + a.each : a.rows;
#pragma unroll 4
    for (std::int64_t row = first; row < end; ++row) {
        float x[VEC], g[VEC];
        load<VEC>(static_cast<const T*>(a.x.data) + row * a.x.stride + column, x);
        load<VEC>(static_cast<const T*>(a.dy.data) + row * a.dy.stride + column, g);
        argument<VEC>(x, bias);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            const Gate gate = gate_of<TANH>(x[e]);
            g[e] *= gate.gate + (x[e] > FAR ? FAR : x[e]) * gate.slope;
            dbias[e] += g[e];
        }
        store<VEC>(static_cast<T*>(a.dx) + row * a.columns + column, g);
    }
    if (a.partial != nullptr) store<VEC>(a.partial + blockIdx.x * a.columns + column, dbias);
}

dim3 grid_of(std::int64_t rows, std::int64_t each, std::int64_t columns, int vec) {
    return dim3(static_cast<unsigned>(ceil_div(rows, each)),
                static_cast<unsigned>(ceil_div(columns, static_cast<std::int64_t>(THREADS) * vec)));
}

template <int VEC_, bool TANH_>
struct Variant {
    static constexpr int VEC = VEC_;
    static constexpr bool TANH = TANH_;
};

template <int VEC, class F>
void with_variant(bool vectors, bool tanh, F f) {
    if (vectors && tanh)
        f(Variant<VEC, true>());
    else if (vectors)
        f(Variant<VEC, false>());
    else if (tanh)
        f(Variant<1, true>());
    else
        f(Variant<1, false>());
}

}  // namespace

void launch_bias_gelu_fwd(const BiasGeluFwd& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) {
        using T = decltype(kind);
        constexpr int VEC = 16 / sizeof(T);
        const bool vectors = a.columns % VEC == 0 && rows_aligned<VEC>(a.x) && aligned(a.bias.data, a.y);
        with_variant<VEC>(vectors, a.tanh, [&](auto variant) {
            using V = decltype(variant);
            launch<bias_gelu_fwd<T, V::VEC, V::TANH>, 0>(grid_of(a.rows, EACH, a.columns, V::VEC), THREADS, stream, a);
        });
    });
}

void launch_bias_gelu_bwd(const BiasGeluBwd& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) {
        using T = decltype(kind);
        constexpr int VEC = 16 / sizeof(T);
        const bool vectors = a.columns % VEC == 0 && rows_aligned<VEC>(a.x) && rows_aligned<VEC>(a.dy) &&
                             aligned(a.bias.data, a.dx, a.partial);
        with_variant<VEC>(vectors, a.tanh, [&](auto variant) {
            using V = decltype(variant);
            launch<bias_gelu_bwd<T, V::VEC, V::TANH>, 0>(grid_of(a.rows, a.each, a.columns, V::VEC), THREADS, stream,
                                                         a);
        });
    });
    PartSums sums;
    sums.add(a.partial, a.dbias);
    launch_sum_parts(sums, a.parts, a.columns, stream);
}

}  // namespace pyxlbert::cuda
