// Dropout bits: Philox 4x32-10, 4 * W consecutive columns at a time.  The counter is
// (column / 4, row, plane, tag); pyxlbert/reference/philox.py is the readable definition.
#pragma once
#include "simd.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

struct Dropout {
    bool active;          // false: nothing is dropped and nothing is scaled
    float scale;          // 1 / (1 - p)
    std::uint32_t limit;  // a word is kept when it is greater
    std::uint32_t key[2];
    Tag tag;
};

// A word is kept iff word >= floor(p * 2^32), that is word > floor(p * 2^32) - 1, which fits 32 bits
// for p = 1 too.
PYXLBERT_INLINE Dropout make_dropout(double p, std::int64_t seed, Tag tag) {
    const std::uint64_t threshold = static_cast<std::uint64_t>(p * 4294967296.0);
    const std::uint64_t key = static_cast<std::uint64_t>(seed);
    return {threshold != 0,
            p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f,
            static_cast<std::uint32_t>(threshold - 1),
            {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)},
            tag};
}

#if defined(__AVX512F__)

PYXLBERT_INLINE VecU broadcast_bits(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
PYXLBERT_INLINE VecU add_bits(VecU a, VecU b) { return _mm512_add_epi32(a, b); }
PYXLBERT_INLINE VecU xor_bits(VecU a, VecU b, VecU c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
PYXLBERT_INLINE void multiply_bits(VecU a, VecU m, VecU& high, VecU& low) {
    const VecU even = _mm512_mul_epu32(a, m);
    const VecU odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
    low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, static_cast<_MM_PERM_ENUM>(0xa0));
    high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xf5));
}
// The four words of a lane become four neighbours: lane group g of words[k] holds block 4 * g + k.
PYXLBERT_INLINE void transpose_groups(VecU w[4]) {
    const VecU a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpacklo_epi32(w[2], w[3]);
    const VecU c = _mm512_unpackhi_epi32(w[0], w[1]), d = _mm512_unpackhi_epi32(w[2], w[3]);
    w[0] = _mm512_unpacklo_epi64(a, b);
    w[1] = _mm512_unpackhi_epi64(a, b);
    w[2] = _mm512_unpacklo_epi64(c, d);
    w[3] = _mm512_unpackhi_epi64(c, d);
}
PYXLBERT_INLINE VecU block_offsets() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
PYXLBERT_INLINE Vec drop(const Dropout& dropout, VecU word, Vec x) {
    return _mm512_maskz_mul_ps(_mm512_cmpgt_epu32_mask(word, broadcast_bits(dropout.limit)), x, set1(dropout.scale));
}

#elif defined(__AVX2__)

PYXLBERT_INLINE VecU broadcast_bits(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
PYXLBERT_INLINE VecU add_bits(VecU a, VecU b) { return _mm256_add_epi32(a, b); }
PYXLBERT_INLINE VecU xor_bits(VecU a, VecU b, VecU c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
PYXLBERT_INLINE void multiply_bits(VecU a, VecU m, VecU& high, VecU& low) {
    const VecU even = _mm256_mul_epu32(a, m);
    const VecU odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
PYXLBERT_INLINE void transpose_groups(VecU w[4]) {
    const VecU a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpacklo_epi32(w[2], w[3]);
    const VecU c = _mm256_unpackhi_epi32(w[0], w[1]), d = _mm256_unpackhi_epi32(w[2], w[3]);
    w[0] = _mm256_unpacklo_epi64(a, b);
    w[1] = _mm256_unpackhi_epi64(a, b);
    w[2] = _mm256_unpacklo_epi64(c, d);
    w[3] = _mm256_unpackhi_epi64(c, d);
}
PYXLBERT_INLINE VecU block_offsets() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
PYXLBERT_INLINE Vec drop(const Dropout& dropout, VecU word, Vec x) {
    // Signed comparison of unsigned words: flip the top bits.
    const VecU top = broadcast_bits(0x80000000u);
    const VecU keep = _mm256_cmpgt_epi32(_mm256_xor_si256(word, top), broadcast_bits(dropout.limit ^ 0x80000000u));
    return _mm256_and_ps(_mm256_castsi256_ps(keep), x * set1(dropout.scale));
}

#else

PYXLBERT_INLINE VecU broadcast_bits(std::uint32_t x) { return VecU{x, x, x, x}; }
PYXLBERT_INLINE VecU add_bits(VecU a, VecU b) { return a + b; }
PYXLBERT_INLINE VecU xor_bits(VecU a, VecU b, VecU c) { return a ^ b ^ c; }
PYXLBERT_INLINE void multiply_bits(VecU a, VecU m, VecU& high, VecU& low) {
    for (int i = 0; i < W; ++i) {
        const std::uint64_t product = static_cast<std::uint64_t>(a[i]) * m[i];
        high[i] = static_cast<std::uint32_t>(product >> 32);
        low[i] = static_cast<std::uint32_t>(product);
    }
}
PYXLBERT_INLINE void transpose_groups(VecU w[4]) {
    VecU t[4];
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 4; ++k) t[i][k] = w[k][i];
    for (int i = 0; i < 4; ++i) w[i] = t[i];
}
PYXLBERT_INLINE VecU block_offsets() { return VecU{0, 1, 2, 3}; }
PYXLBERT_INLINE Vec drop(const Dropout& dropout, VecU word, Vec x) {
    const Vec scaled = x * set1(dropout.scale);
    return word > broadcast_bits(dropout.limit) ? scaled : set1(0.0f);
}

#endif

// Words of columns column .. column + 4 * W - 1 of one row, in order: words[n] belongs to the vector at
// column + n * W.  `column` is a multiple of 4.
PYXLBERT_INLINE void dropout_words(const Dropout& dropout, std::uint32_t column, std::uint32_t row, std::uint32_t plane,
                                   VecU words[4]) {
    const VecU m0 = broadcast_bits(0xd2511f53u), m1 = broadcast_bits(0xcd9e8d57u);
    std::uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
    // Lanes count in the order that makes transpose_groups put neighbours together.
    VecU c0 = add_bits(broadcast_bits(column / 4), block_offsets());
    VecU c1 = broadcast_bits(row), c2 = broadcast_bits(plane);
    VecU c3 = broadcast_bits(static_cast<std::uint32_t>(dropout.tag));
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        VecU high0, low0, high1, low1;
        multiply_bits(c0, m0, high0, low0);
        multiply_bits(c2, m1, high1, low1);
        c0 = xor_bits(high1, c1, broadcast_bits(k0));
        c2 = xor_bits(high0, c3, broadcast_bits(k1));
        c1 = low1;
        c3 = low0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
    transpose_groups(words);
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
