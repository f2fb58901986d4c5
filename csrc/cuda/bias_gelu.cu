// bias_gelu: a thread has VEC neighbouring columns and walks down some rows, so that it loads the bias once and adds up
// its gradient in registers; launch_sum_parts adds up the blocks' sums.
//
//     x [M, N] + bias [N]  ->  z  ->  z g(z), g the share that passes
//     dy, x    [M, N]      ->  dx = dy (g + z g')
//
// The exact gate is Phi(z) = erfc(-z / sqrt 2) / 2, which far below zero has digits where 1 + erf has none left.
// Memory leaves an H100 time for 35 instructions an element of 16 bits forward and 53 backward; with erfcf and expf
// there would be 54 and 70.
#include "cuda/bias_gelu.h"

#include "cuda/rows.cuh"
#include "cuda/sums.cuh"

namespace pyxlbert::cuda {
namespace {

// As in the reference: past it the gate is 0 or 1 and its slope 0; an infinite z would be NaN times either.
constexpr float FAR = 50.0f;
constexpr int THREADS = 128;
constexpr std::int64_t EACH = 8;  // rows of a block forward: four loads under way, twice

constexpr float LOG2E = 1.4426950408889634f;

// The upper tail of the normal distribution, Q(a) = erfc(a / sqrt 2) / 2, and e^(-a^2 / 2), which it needs anyway.
struct Tail {
    float area, density;
};

// Of 0 <= a <= FAR: Q(a) = e^(-a^2 / 2) t P(t) with t = 1 / (1 + c a), so that a small tail has its digits, which
// 1 - erf would lose.  P is a minimax polynomial: relative error 4e-8, or 5e-6 where ROUGH, a fiftieth of float16's
// rounding.
template <bool ROUGH>
DEVICE Tail tail_of(float a) {
    constexpr float DIGITS[] = {-0.0261207055f, 0.139500499f, -0.273134589f, 0.202184513f, -0.0447195619f,
                                0.115359567f,   0.115197577f, 0.136112213f,  0.135620505f};
    constexpr float FEW_DIGITS[] = {-0.07393338f, 0.18046251f, 0.015731657f, 0.13343628f, 0.1204398f, 0.12386083f};
    const float density = exp2_approx(a * a * (-0.5f * LOG2E));
    const float t = reciprocal_approx(fmaf(a, ROUGH ? 0.31f : 0.34f, 1.0f));
    constexpr int DEGREE = ROUGH ? 5 : 8;
    float p = ROUGH ? FEW_DIGITS[0] : DIGITS[0];
#pragma unroll
    for (int n = 1; n <= DEGREE; ++n) p = fmaf(p, t, ROUGH ? FEW_DIGITS[n] : DIGITS[n]);
    return {p * t * density, density};
}

// The gate of "tanh", the logistic function of 2 sqrt(2 / pi) (z + 0.044715 z^3).
DEVICE float logistic_gate(float z) {
    constexpr float C = -1.5957691216057308f * LOG2E;
    return reciprocal_approx(1.0f + exp2_approx(z * fmaf(z * z, 0.044715f * C, C)));
}

// ROUGH: the result is rounded to 16 bits.
template <bool TANH, bool ROUGH>
DEVICE float gelu(float z) {
    if constexpr (TANH) {
        const float low = -min_or_nan(-z, FAR);
        return low * logistic_gate(low);
    } else {
        const float a = min_or_nan(fabsf(z), FAR);
        // z Q(-z), or z - z Q(z); a maximum makes a number of a NaN, but the other term is one.
        return fmaf(-a, tail_of<ROUGH>(a).area, fmaxf(z, 0.0f));
    }
}

// The derivative.
template <bool TANH>
DEVICE float gelu_slope(float z) {
    const float a = min_or_nan(fabsf(z), FAR), near = copysignf(a, z);
    if constexpr (TANH) {
        const float gate = logistic_gate(near);
        const float slope = 1.5957691216057308f * fmaf(near * near, 0.134145f, 1.0f);
        return fmaf(near * slope, fmaf(-gate, gate, gate), gate);
    } else {
        const Tail tail = tail_of<false>(a);
        return fmaf(near * 0.3989422804014327f, tail.density, z < 0.0f ? tail.area : 1.0f - tail.area);
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
#pragma unroll
        for (int e = 0; e < VEC; ++e) x[e] = gelu<TANH, sizeof(T) == 2>(x[e] + bias[e]);
        store<VEC>(static_cast<T*>(a.y) + row * a.columns + column, x);
    }
}

template <class T, int VEC, bool TANH>
__global__ void __launch_bounds__(THREADS) bias_gelu_bwd(const BiasGeluBwd a) {
    const int column = static_cast<int>(blockIdx.y * THREADS + threadIdx.x) * VEC;
    if (column >= a.columns) return;
    float bias[VEC], dbias[VEC], lost[VEC];
    load_bias<VEC>(a.bias, column, bias);
#pragma unroll
    for (int e = 0; e < VEC; ++e) dbias[e] = lost[e] = 0.0f;
    const std::int64_t first = blockIdx.x * a.each, end = first + a.each < a.rows ? first + a.each : a.rows;
#pragma unroll 4
    for (std::int64_t row = first; row < end; ++row) {
        float x[VEC], g[VEC];
        load<VEC>(static_cast<const T*>(a.x.data) + row * a.x.stride + column, x);
        load<VEC>(static_cast<const T*>(a.dy.data) + row * a.dy.stride + column, g);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            g[e] *= gelu_slope<TANH>(x[e] + bias[e]);
            add_exactly(dbias[e], lost[e], g[e]);
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
