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

// q of one row, zero from n to padded, in runs of W integers that begin at q(j).  A row with an infinity or a NaN gets
// a NaN for its scale.
template <class E, class Place>
PYXLBERT_INLINE Range quantise_row(const E* x, std::int64_t n, std::int64_t padded, Place q) {
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
        _mm_mask_storeu_epi8(q(j), first_lanes(count), _mm512_cvtepi32_epi8(bits));
#else
        VecI bits = (VecI)v & 255;
#if defined(__AVXVNNI__)
        if (count == W) {
            // Two lanes of four integers each to bytes: their halves lie four integers apart.
            const __m256i words = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
            const __m256i bytes = _mm256_packus_epi16(words, words);
            const int low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
            __builtin_memcpy(q(j), &low, 4);
            __builtin_memcpy(q(j) + 4, &high, 4);
            return;
        }
#endif
        for (int i = 0; i < count; ++i) q(j)[i] = static_cast<IntegerUnit::Row>(bits[i]);
#endif
    });
    for (std::int64_t j = n; j < padded; ++j) q(j / W * W)[j % W] = 0;
    return {low, range * (1.0f / 255.0f) + reduce_add(poison)};
}

// What one thread needs for a product of `rows` rows: sums, and, where the product does not read them as they lie, the
// rows in its order: integers with their ranges, or tiles.
struct ProductScratch {
    float *sums, *arranged;
    Range* ranges;

    static PYXLBERT_INLINE std::int64_t integer_stride(std::int64_t inner) { return round_to(inner, 64); }
    static PYXLBERT_INLINE std::int64_t arranged_floats(std::int64_t rows, std::int64_t inner) {
#if defined(__AMX_BF16__)
        return blocks_of(rows) * BLOCK_ROWS * integer_stride(inner) / 2;
#else
        return rows * integer_stride(inner) * static_cast<std::int64_t>(sizeof(IntegerUnit::Row)) / 4;
#endif
    }
    static PYXLBERT_INLINE std::int64_t floats(std::int64_t rows, std::int64_t inner) {
        return product_scratch(rows) + arranged_floats(rows, inner) + round_to(2 * rows, 16);
    }
    PYXLBERT_INLINE ProductScratch(float* data, std::int64_t rows, std::int64_t inner)
        : sums(data),
          arranged(sums + product_scratch(rows)),
          ranges(reinterpret_cast<Range*>(arranged + arranged_floats(rows, inner))) {}
};

// An epilogue of a product of integers: their sums, WIDTH to a panel, become those of numbers first.
template <int WIDTH, class Epilogue>
struct Dequantised {
    Epilogue epilogue;
    const PackedMatrix& w;
    const Range* ranges;

    template <class F>
    PYXLBERT_INLINE void with_row(F use) const {
        epilogue.with_row([&](auto finish) PYXLBERT_LAMBDA {
            const float *scales = w.scales, *sums = w.sums;
            const Range* of = ranges;
            use([=](std::int64_t row, std::int64_t column, int columns, float* c) PYXLBERT_LAMBDA {
                const Vec low = set1(of[row].low), scale = set1(of[row].scale);
                for (int n = 0; n < WIDTH; n += W) {
                    const Vec sum = __builtin_convertvector((VecI)load(c + n), Vec);
                    store(c + n, fma(sum, scale * load(scales + column + n), low * load(sums + column + n)));
                }
                finish(row, column, columns, c);
            });
        });
    }
};

// Rows x with elements E in the order of products with w, if that is not their own.
template <class E>
PYXLBERT_INLINE void arrange(const E* x, std::int64_t stride, std::int64_t rows, const PackedMatrix& w,
                             const ProductScratch& scratch) {
    using Integer = IntegerUnit::Row;
    if (w.quantised) {
        const std::int64_t integers = ProductScratch::integer_stride(w.inner);
        for (std::int64_t r = 0; r < rows; ++r) {
#if defined(__AMX_BF16__)
            constexpr std::int64_t a_step = LINE;
            auto* q = reinterpret_cast<Integer*>(scratch.arranged + tile_row(r, integers / a_step));
            const auto place = [=](std::int64_t j)
                                   PYXLBERT_LAMBDA { return q + j / a_step * (STEP_FLOATS * 4) + j % a_step; };
#else
            auto* q = reinterpret_cast<Integer*>(scratch.arranged) + r * integers;
            const auto place = [=](std::int64_t j) PYXLBERT_LAMBDA { return q + j; };
#endif
            scratch.ranges[r] = quantise_row(x + r * stride, w.inner, integers, place);
        }
        return;
    }
#if defined(__AMX_BF16__)
    if constexpr (sizeof(E) == 2) arrange_rows(x, stride, rows, w.inner, scratch.arranged, TileShape(w).steps);
#endif
}

// As `product`, of rows x with elements E that `arrange` has seen; their number and K are at most those of the scratch.
template <class U, class E, class Epilogue>
PYXLBERT_INLINE void multiply_arranged(const E* x, std::int64_t stride, std::int64_t rows, const PackedMatrix& w,
                                       std::int64_t first, std::int64_t last, const ProductScratch& scratch,
                                       const Epilogue& epilogue) {
#if defined(__AMX_BF16__)
    const auto multiply = [&](auto unit, const auto& after) PYXLBERT_LAMBDA {
        after.with_row([&](auto finish) PYXLBERT_LAMBDA {
            tile_product<decltype(unit)>(scratch.arranged, rows, w, first, last, scratch.sums, finish);
        });
    };
    if (w.quantised)
        multiply(ByteTileUnit{}, Dequantised<TILE_PANEL, Epilogue>{epilogue, w, scratch.ranges});
    else if constexpr (sizeof(E) == 2)
        multiply(Bf16TileUnit{}, epilogue);
    else
        product<U>(x, stride, rows, w, first, last, scratch.sums, epilogue);
#else
    if (w.quantised)
        product<IntegerUnit>(scratch.arranged, ProductScratch::integer_stride(w.inner) / IntegerUnit::PAIR, rows, w,
                             first, last, scratch.sums, Dequantised<PANEL, Epilogue>{epilogue, w, scratch.ranges});
    else
        product<U>(reinterpret_cast<const float*>(x), stride / U::PAIR, rows, w, first, last, scratch.sums, epilogue);
#endif
}

template <class U, class E, class Epilogue>
PYXLBERT_INLINE void multiply_rows(const E* x, std::int64_t stride, std::int64_t rows, const PackedMatrix& w,
                                   std::int64_t first, std::int64_t last, const ProductScratch& scratch,
                                   const Epilogue& epilogue) {
    arrange(x, stride, rows, w, scratch);
    multiply_arranged<U>(x, stride, rows, w, first, last, scratch, epilogue);
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
