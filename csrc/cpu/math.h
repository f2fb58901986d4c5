// exp and the normal distribution on a vector of floats, accurate to a few units in the last place.  All of it
// in the compiler's vector operators, so that every level runs the same steps; a NaN comes out as NaN.
#pragma once
#include "simd.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Signed 32-bit lanes beside Vec, with element-wise operators.
typedef std::int32_t VecI __attribute__((vector_size(4 * W)));

// x within [low, high]; min and max keep their second operand when that is NaN.
PYXLBERT_INLINE Vec clamp(Vec x, float low, float high) { return min(set1(high), max(set1(low), x)); }

PYXLBERT_INLINE Vec absolute(Vec x) { return max(x, zero() - x); }

// e^x for -87.3 <= x <= 88.3, where the result is a normal number; the caller bounds x.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n e^r; ln 2 in two pieces, the first (355 / 512) with so few bits
// that n times it is exact; e^r by a minimax polynomial of degree 6, relative error 3e-9.
PYXLBERT_INLINE Vec exp(Vec x) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const Vec magic = set1(12582912.0f);
    const Vec shifted = fma(x, set1(1.44269504f), magic);
    const Vec n = shifted - magic;
    const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
    Vec p = set1(0.00138144649f);
    p = fma(p, r, set1(0.00836878084f));
    p = fma(p, r, set1(0.0416683927f));
    p = fma(p, r, set1(0.166665196f));
    p = fma(p, r, set1(0.49999994f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    // Times 2^n: n added to the exponent; the shift drops every bit of the magic number.
    return (Vec)((VecI)p + ((VecI)shifted << 23));
}

// The normal distribution's upper tail Q(a) = erfc(a / sqrt(2)) / 2 and e^(-a^2/2), for 0 <= a <= 13.2.
//
// Q(a) = e^(-a^2/2) R(a); R in t = 1 / (1 + 0.34 a) by a minimax polynomial, relative error 3e-8, so that the
// tail keeps its digits, which 1 - erf would lose.
PYXLBERT_INLINE Vec normal_tail(Vec a, Vec& density) {
    density = exp(a * a * set1(-0.5f));
    const Vec t = set1(1.0f) / fma(a, set1(0.34f), set1(1.0f));
    Vec p = set1(-0.0261207055f);
    p = fma(p, t, set1(0.139500499f));
    p = fma(p, t, set1(-0.273134589f));
    p = fma(p, t, set1(0.202184513f));
    p = fma(p, t, set1(-0.0447195619f));
    p = fma(p, t, set1(0.115359567f));
    p = fma(p, t, set1(0.115197577f));
    p = fma(p, t, set1(0.136112213f));
    p = fma(p, t, set1(0.135620505f));
    return p * t * density;
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
