// One vector of floats per instruction-set level, and the loads and stores that widen bfloat16 and
// float16 to it.  The arithmetic operators are the compiler's own on vector types, so kernels read like
// scalar code.  Only always-inline functions: see types.h for why no library code may enter.
#pragma once
#include "../types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(unsigned long address, unsigned long size);
extern "C" void __asan_storeN(unsigned long address, unsigned long size);
#endif

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// AddressSanitizer does not see masked loads and stores, so they report themselves to it.
template <class T>
PYXLBERT_INLINE void watch_load([[maybe_unused]] const T* p, [[maybe_unused]] int n) {
#if defined(__SANITIZE_ADDRESS__)
    if (n > 0) __asan_loadN(reinterpret_cast<unsigned long>(p), static_cast<unsigned long>(n) * sizeof(T));
#endif
}
template <class T>
PYXLBERT_INLINE void watch_store([[maybe_unused]] T* p, [[maybe_unused]] int n) {
#if defined(__SANITIZE_ADDRESS__)
    if (n > 0) __asan_storeN(reinterpret_cast<unsigned long>(p), static_cast<unsigned long>(n) * sizeof(T));
#endif
}

#if defined(__AVX512F__)

using Vec = __m512;
using VecU = __m512i;
constexpr int W = 16;

PYXLBERT_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
PYXLBERT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
PYXLBERT_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
PYXLBERT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PYXLBERT_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PYXLBERT_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
PYXLBERT_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
PYXLBERT_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }

PYXLBERT_INLINE __mmask16 first_lanes(int n) {
    return n >= W   ? static_cast<__mmask16>(0xffff)
           : n <= 0 ? static_cast<__mmask16>(0)
                    : static_cast<__mmask16>((1u << n) - 1);
}

PYXLBERT_INLINE Vec widen(__m256i bits, bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PYXLBERT_INLINE Vec widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }

PYXLBERT_INLINE __m256i narrow(Vec v, bf16) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
#endif
}
PYXLBERT_INLINE __m256i narrow(Vec v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <class T>
PYXLBERT_INLINE Vec load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
PYXLBERT_INLINE void store(T* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}

PYXLBERT_INLINE Vec keep_first(Vec v, int n) { return _mm512_maskz_mov_ps(first_lanes(n), v); }

// The first n lanes; the others are zero on load and untouched on store.
PYXLBERT_INLINE Vec load(const float* p, int n) {
    watch_load(p, n < W ? n : W);
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
PYXLBERT_INLINE void store(float* p, Vec v, int n) {
    watch_store(p, n < W ? n : W);
    _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
template <class T>
PYXLBERT_INLINE Vec load(const T* p, int n) {
    watch_load(p, n < W ? n : W);
    return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
}
template <class T>
PYXLBERT_INLINE void store(T* p, Vec v, int n) {
    watch_store(p, n < W ? n : W);
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v, T{}));
}

#elif defined(__AVX2__)

using Vec = __m256;
using VecU = __m256i;
constexpr int W = 8;

PYXLBERT_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
PYXLBERT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PYXLBERT_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
PYXLBERT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PYXLBERT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PYXLBERT_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
PYXLBERT_INLINE float reduce_add(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PYXLBERT_INLINE float reduce_max(Vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

PYXLBERT_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

PYXLBERT_INLINE Vec widen(__m128i bits, bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PYXLBERT_INLINE Vec widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }

PYXLBERT_INLINE __m128i narrow(Vec v, bf16) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_packus_epi32(result, result);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
PYXLBERT_INLINE __m128i narrow(Vec v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <class T>
PYXLBERT_INLINE Vec load(const T* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
PYXLBERT_INLINE void store(T* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}

PYXLBERT_INLINE Vec keep_first(Vec v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first_lanes(n))); }

PYXLBERT_INLINE Vec load(const float* p, int n) {
    watch_load(p, n < W ? n : W);
    return _mm256_maskload_ps(p, first_lanes(n));
}
PYXLBERT_INLINE void store(float* p, Vec v, int n) {
    watch_store(p, n < W ? n : W);
    _mm256_maskstore_ps(p, first_lanes(n), v);
}
template <class T>
PYXLBERT_INLINE Vec load(const T* p, int n) {
    alignas(16) T lanes[W] = {};
    for (int i = 0; i < n && i < W; ++i) lanes[i] = p[i];
    return load(lanes);
}
template <class T>
PYXLBERT_INLINE void store(T* p, Vec v, int n) {
    alignas(16) T lanes[W];
    store(lanes, v);
    for (int i = 0; i < n && i < W; ++i) p[i] = lanes[i];
}

#else

// Four floats through the compiler's vector extension: SSE2 on x86-64, NEON on aarch64.
typedef float Vec __attribute__((vector_size(16)));
typedef std::uint32_t VecU __attribute__((vector_size(16)));
constexpr int W = 4;

PYXLBERT_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
PYXLBERT_INLINE Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
PYXLBERT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
PYXLBERT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PYXLBERT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
PYXLBERT_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
PYXLBERT_INLINE float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
PYXLBERT_INLINE float reduce_max(Vec v) {
    const float a = v[0] > v[2] ? v[0] : v[2];
    const float b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}

PYXLBERT_INLINE float bits_to_float(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
PYXLBERT_INLINE std::uint32_t float_to_bits(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

PYXLBERT_INLINE float widen(bf16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }
PYXLBERT_INLINE float widen(f16 x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000) << 16;
    const std::uint32_t magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
    // Subnormal: the magnitude is a multiple of 2^-24.
    return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

PYXLBERT_INLINE bf16 narrow(float x, bf16) {
    const std::uint32_t bits = float_to_bits(x);
    if (x != x) return {0x7fc0};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
PYXLBERT_INLINE f16 narrow(float x, f16) {
    const std::uint32_t bits = float_to_bits(x);
    const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    const std::uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<std::uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    if (magnitude >= 0x38800000) {
        const std::uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        return {static_cast<std::uint16_t>(sign | (rounded - 0x38000000) >> 13)};
    }
    // Below 2^-14 the spacing is 2^-24; adding 0.5 lets the float unit round to it.
    const std::uint32_t steps = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
    return {static_cast<std::uint16_t>(sign | steps)};
}

template <class T>
PYXLBERT_INLINE Vec load(const T* p) {
    return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
PYXLBERT_INLINE void store(T* p, Vec v) {
    for (int i = 0; i < W; ++i) p[i] = narrow(v[i], T{});
}
// v with the lanes from n on set to zero.
PYXLBERT_INLINE Vec keep_first(Vec v, int n) {
    for (int i = n; i < W; ++i) v[i] = 0.0f;
    return v;
}
PYXLBERT_INLINE Vec load(const float* p, int n) {
    Vec v = set1(0.0f);
    for (int i = 0; i < n && i < W; ++i) v[i] = p[i];
    return v;
}
PYXLBERT_INLINE void store(float* p, Vec v, int n) {
    for (int i = 0; i < n && i < W; ++i) p[i] = v[i];
}
template <class T>
PYXLBERT_INLINE Vec load(const T* p, int n) {
    Vec v = set1(0.0f);
    for (int i = 0; i < n && i < W; ++i) v[i] = widen(p[i]);
    return v;
}
template <class T>
PYXLBERT_INLINE void store(T* p, Vec v, int n) {
    for (int i = 0; i < n && i < W; ++i) p[i] = narrow(v[i], T{});
}

#endif

PYXLBERT_INLINE Vec zero() { return set1(0.0f); }

PYXLBERT_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
