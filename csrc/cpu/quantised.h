// Products of rows with a packed weight, whatever it is packed as; rows meet eight-bit weights as eight-bit integers.
//
// A row x of K numbers is low + scale q with integers q of 0 to 255, low and scale its own.  A column of the weight is
// s w with integers w of -127 to 127.  So x . (s w) = (scale s) (q . w) + low (s sum w): the first sum is exact in
// int32, and the second is known when the weight is packed.
#pragma once
#include "gemm.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

struct Range {
    float low, scale;
};

// q of one row, zero from n to padded.  A row with an infinity or a NaN gets a NaN for its scale.
template <class E>
PYXLBERT_INLINE Range quantise_row(const E* x, std::int64_t n, IntegerUnit::Row* q, std::int64_t padded) {
    Vec lowest = set1(__builtin_inff()), highest = set1(-__builtin_inff()), poison = zero();
    for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
        const Vec v = load_some(x + j, count);
        poison = fma(v, zero(), poison);
        if (count == W) {
            lowest = min(lowest, v);
            highest = max(highest, v);
        } else {
            for (int i = 0; i < count; ++i) {
                float one[W];
                store(one, v);
                lowest = min(lowest, set1(one[i]));
                highest = max(highest, set1(one[i]));
            }
        }
    });
    const float low = -reduce_max(zero() - lowest), range = reduce_max(highest) - low;
    const float inverse = range > 0.0f ? 255.0f / range : 0.0f;
    for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        const Vec v = fma(load_some(x + j, count) - set1(low), set1(inverse), set1(12582912.0f));
#if defined(__AVX512VNNI__)
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(255));
        _mm_mask_storeu_epi8(q + j, first_lanes(count), _mm512_cvtepi32_epi8(bits));
#else
        VecI bits = (VecI)v & 255;
        for (int i = 0; i < count; ++i) q[j + i] = static_cast<IntegerUnit::Row>(bits[i]);
#endif
    });
    for (std::int64_t j = n; j < padded; ++j) q[j] = 0;
    return {low, range * (1.0f / 255.0f) + reduce_add(poison)};
}

// What one thread needs for a product of `rows` rows: sums, and integers and ranges for a quantised weight.
struct ProductScratch {
    float* sums;
    IntegerUnit::Row* integers;
    Range* ranges;

    static PYXLBERT_INLINE std::int64_t integer_stride(std::int64_t inner) { return round_to(inner, 64); }
    static PYXLBERT_INLINE std::int64_t floats(std::int64_t rows, std::int64_t inner) {
        const std::int64_t bytes = rows * integer_stride(inner) * static_cast<std::int64_t>(sizeof(IntegerUnit::Row));
        return product_scratch(rows) + round_to(bytes / 4, 16) + round_to(2 * rows, 16);
    }
    PYXLBERT_INLINE ProductScratch(float* data, std::int64_t rows, std::int64_t inner)
        : sums(data),
          integers(reinterpret_cast<IntegerUnit::Row*>(data + product_scratch(rows))),
          ranges(reinterpret_cast<Range*>(data + floats(rows, inner) - round_to(2 * rows, 16))) {}
};

// As `product`, of rows x with elements E; their number and K are at most those of the scratch.
template <class U, class E, class Epilogue>
PYXLBERT_INLINE void multiply_rows(const E* x, std::int64_t stride, std::int64_t rows, const PackedMatrix& w,
                                   std::int64_t first, std::int64_t last, const ProductScratch& scratch,
                                   Epilogue epilogue) {
    if (!w.quantised) {
        product<U>(reinterpret_cast<const float*>(x), stride / U::PAIR, rows, w, first, last, scratch.sums, epilogue);
        return;
    }
    const std::int64_t integers = ProductScratch::integer_stride(w.inner);
    for (std::int64_t r = 0; r < rows; ++r)
        scratch.ranges[r] = quantise_row(x + r * stride, w.inner, scratch.integers + r * integers, integers);
    product<IntegerUnit>(
        reinterpret_cast<const float*>(scratch.integers), integers / IntegerUnit::PAIR, rows, w, first, last,
        scratch.sums, [&](std::int64_t row, int count, std::int64_t column, int columns, float* c) PYXLBERT_LAMBDA {
            for (int i = 0; i < count; ++i) {
                const Vec low = set1(scratch.ranges[row + i].low), scale = set1(scratch.ranges[row + i].scale);
                for (int n = 0; n < PANEL; n += W) {
                    float* at = c + i * PANEL + n;
                    const Vec sum = __builtin_convertvector((VecI)load(at), Vec);
                    store(at, fma(sum, scale * load(w.scales + column + n), low * load(w.sums + column + n)));
                }
            }
            epilogue(row, count, column, columns, c);
        });
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
