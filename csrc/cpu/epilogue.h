// What goes before a product, and what follows it while its sums are in the first-level cache: see gemm.h.
#pragma once
#include "gelu.h"
#include "gemm.h"
#include "linear.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// n elements of T as elements of E, and zeros from there to the target's stride.
template <class T, class E>
PYXLBERT_INLINE void convert_row(const T* source, E* target, std::int64_t n, std::int64_t stride) {
    for (std::int64_t j = 0; j < stride; j += W) {
        const std::int64_t left = n - j;
        store(target + j, left >= W ? load(source + j) : left > 0 ? load(source + j, static_cast<int>(left)) : zero());
    }
}

#if defined(__AVX512BF16__)
// gelu to the precision of bfloat16: relative error 1.1e-4 with the tail.  In the shape of Erf::value, with 2^x by a
// polynomial of degree 3 and without a division.
PYXLBERT_INLINE Vec short_gelu(Vec z) {
    const Vec a = min(set1(Erf::FAR), absolute(z));
    const Vec x = a * a * set1(-0.72134752f);
    const Vec f = _mm512_reduce_ps(x, 1);  // x - floor(x)
    Vec p = set1(0.078024523f);
    p = fma(p, f, set1(0.22606716f));
    p = fma(p, f, set1(0.69583354f));
    p = fma(p, f, set1(0.99992522f));
    const Vec density = _mm512_scalef_ps(p, x);
    const Vec t = _mm512_rcp14_ps(fma(a, set1(0.34f), set1(1.0f)));
    Vec q = set1(-0.0765851065f);
    q = fma(q, t, set1(0.251181547f));
    q = fma(q, t, set1(0.0371199612f));
    q = fma(q, t, set1(0.15420103f));
    q = fma(q, t, set1(0.134139379f));
    return max(zero(), z) - (a * density) * (q * t);
}
#endif

PYXLBERT_INLINE Vec silu(Vec z) {
    // Beyond these bounds the sigmoid is 1, or its product with z below the smallest normal number.
    return z / (set1(1.0f) + exp(clamp(zero() - z, -87.0f, 88.0f)));
}

// Calls function(f) with the activation as a function of a vector, exact to the rounding of T.
template <class T, class F>
PYXLBERT_INLINE void with_activation(Activation activation, F function) {
    switch (activation) {
        case Activation::none:
            return function([](Vec z) PYXLBERT_LAMBDA { return z; });
        case Activation::gelu:
#if defined(__AVX512BF16__)
            if constexpr (sizeof(T) == 2) return function([](Vec z) PYXLBERT_LAMBDA { return short_gelu(z); });
#endif
            return function([](Vec z) PYXLBERT_LAMBDA { return Erf::value(z); });
        case Activation::gelu_tanh:
            return function([](Vec z) PYXLBERT_LAMBDA { return Tanh::value(z); });
        case Activation::relu:
            return function([](Vec z) PYXLBERT_LAMBDA { return max(zero(), z); });
        case Activation::silu:
            return function([](Vec z) PYXLBERT_LAMBDA { return silu(z); });
    }
}

// An epilogue has with_row: it calls use(finish) once, and finish(row, column, columns, c) then does one row's sums c
// of the columns from `column` on.  It holds copies of what it needs, which loops around it then keep in registers.

// y = activation(c + bias), rows `stride` elements apart.
template <class T>
struct StoreRows {
    T* y;
    std::int64_t stride;
    const float* bias;  // with zeros to the end of the last panel
    Activation activation;

    template <class F>
    PYXLBERT_INLINE void with_row(F use) const {
        with_activation<T>(activation, [&](auto f) PYXLBERT_LAMBDA {
            use([=, *this](std::int64_t row, std::int64_t column, int columns, const float* c) PYXLBERT_LAMBDA {
                T* to = y + row * stride + column;
                int n = 0;
                for (; n + W <= columns; n += W) store(to + n, f(load(c + n) + load(bias + column + n)));
                if (n < columns) store(to + n, f(load(c + n) + load(bias + column + n)), columns - n);
            });
        });
    }
};

// stream += c + bias; the stream has room for whole vectors.
struct AddRows {
    float* stream;
    std::int64_t stride;
    const float* bias;  // with zeros to the end of the last panel

    template <class F>
    PYXLBERT_INLINE void with_row(F use) const {
        use([*this](std::int64_t row, std::int64_t column, int columns, const float* c) PYXLBERT_LAMBDA {
            float* to = stream + row * stride + column;
            for (int n = 0; n < columns; n += W) store(to + n, load(to + n) + (load(c + n) + load(bias + column + n)));
        });
    }
};

#if defined(__AMX_BF16__)
// y = activation(c + bias) as rows of a later product, in tile order from column `first` on.
struct StoreTiles {
    bf16* y;
    std::int64_t steps, first;
    const float* bias;  // with zeros to the end of the last panel
    Activation activation;

    template <class F>
    PYXLBERT_INLINE void with_row(F use) const {
        with_activation<bf16>(activation, [&](auto f) PYXLBERT_LAMBDA {
            use([=, *this](std::int64_t row, std::int64_t column, int columns, const float* c) PYXLBERT_LAMBDA {
                Vec low = f(load(c) + load(bias + column)), high = f(load(c + W) + load(bias + column + W));
                if (columns < TILE_PANEL) {
                    low = keep_first(low, columns);
                    high = keep_first(high, columns - W);
                }
                // A panel of 32 columns is a step of 16 pairs.
                bf16* to = y + 2 * (tile_row(row, steps) + (column - first) / TILE_PANEL * STEP_FLOATS);
                store(to, low);
                store(to + W, high);
            });
        });
    }
};
#endif

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
