// gelu and its derivative on a vector of floats.
//
// With Phi the normal distribution, phi its density and Q(a) = Phi(-a) for a >= 0:
//     none: gelu(z) = z Phi(z) = max(z, 0) - |z| Q(|z|),  gelu'(z) = Phi(z) + z phi(z);
//     tanh: gelu(z) = z s, s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3),  gelu'(z) = s + z s (1 - s) 2u'.
// Neither form subtracts nearly equal numbers, so the negative tail keeps its digits.
#pragma once
#include "math.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

struct Erf {
    // From here on Q is near the smallest normal number; numbers below it take a hundred times as long, and an infinite
    // z must not meet them in a product.
    static constexpr float FAR = 12.9f;
    static PYXLBERT_INLINE Vec value(Vec z) {
        const Vec a = min(set1(FAR), absolute(z));
        Vec density;
        return max(zero(), z) - a * normal_tail(a, density);
    }
    static PYXLBERT_INLINE Vec slope(Vec z) {
        const Vec a = min(set1(FAR), absolute(z));
        Vec density;
        const Vec tail = normal_tail(a, density);
        // Phi + z phi on the positive side; the negative side is one less that.
        const Vec positive = fma(a * density, set1(0.398942280f), set1(1.0f) - tail);
        const Vec negative = fma(a * density, set1(-0.398942280f), tail);
        return z < zero() ? negative : positive;
    }
};

struct Tanh {
    // The same for s and 1 - s.
    static constexpr float FAR = 10.0f;
    // e^(-2u) and s = 1 / (1 + e^(-2u)) of a bounded z.
    static PYXLBERT_INLINE Vec gate(Vec z, Vec& e) {
        const Vec cube = fma(z * z * set1(0.044715f), z, z);
        e = exp(cube * set1(-1.59576912f));
        return set1(1.0f) / (set1(1.0f) + e);
    }
    static PYXLBERT_INLINE Vec value(Vec z) {
        Vec e;
        const Vec s = gate(clamp(z, -FAR, FAR), e);
        return max(set1(-FAR), z) * s;
    }
    static PYXLBERT_INLINE Vec slope(Vec z) {
        const Vec bounded = clamp(z, -FAR, FAR);
        Vec e;
        const Vec s = gate(bounded, e);
        const Vec twice_du = fma(bounded * bounded, set1(0.214064126f), set1(1.59576912f));
        return fma(bounded * twice_du * s, e * s, s);
    }
};

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
