// What forward and backward of attention share: one (sequence, head) as pointers, and the work on rows
// of scores between the matrix products.
#pragma once
#include <omp.h>

#include "attention.h"
#include "gemm_tile.h"
#include "philox.h"
#include "team.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float INFINITY_ = __builtin_inff();

PYXLBERT_INLINE int thread_index() { return omp_get_thread_num(); }

PYXLBERT_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
PYXLBERT_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Lanes 0 .. n - 1 of v, `other` behind them.
PYXLBERT_INLINE Vec first_else(Vec v, int n, Vec other) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(other, first_lanes(n), v);
#elif defined(__AVX2__)
    return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(first_lanes(n)));
#else
    for (int i = 0; i < W; ++i)
        if (i >= n) v[i] = other[i];
    return v;
#endif
}

// 2^x for x <= 0, exactly 0 for -inf; NaN stays.  Degree 5 on [0, 1): relative error 7.5e-8; degree 3,
// enough for weights that are rounded to bfloat16 next: 7.5e-5.
template <int DEGREE>
PYXLBERT_INLINE Vec exp2_nonpositive(Vec x) {
#if defined(__AVX512F__)
    const Vec f = _mm512_reduce_ps(x, 1);  // x - floor(x)
#elif defined(__AVX2__)
    x = _mm256_max_ps(set1(-127.0f), x);  // the second operand where one is NaN
    const Vec whole = _mm256_floor_ps(x);
    const Vec f = x - whole;
#else
    const Vec low = set1(-126.5f), magic = set1(12582912.0f);
    x = x < low ? low : x;
    const Vec whole = ((x - set1(0.5f)) + magic) - magic;  // rounds to an integer
    const Vec f = x - whole;
#endif
    Vec p;
    if constexpr (DEGREE == 5) {
        p = set1(1.8775767e-3f);
        p = fma(p, f, set1(8.9893401e-3f));
        p = fma(p, f, set1(5.5826318e-2f));
        p = fma(p, f, set1(2.4015362e-1f));
        p = fma(p, f, set1(6.9315307e-1f));
        p = fma(p, f, set1(9.9999993e-1f));
    } else {
        p = set1(0.078024523f);
        p = fma(p, f, set1(0.22606716f));
        p = fma(p, f, set1(0.69583354f));
        p = fma(p, f, set1(0.99992522f));
    }
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, x);
#elif defined(__AVX2__)
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
#else
    typedef std::int32_t Int __attribute__((vector_size(16)));
    const Int exponent = (__builtin_convertvector(whole, Int) + 127) << 23;
    Vec power;
    __builtin_memcpy(&power, &exponent, sizeof power);
    return p * power;
#endif
}

PYXLBERT_INLINE float exp2_scalar(float x) {
    float lanes[W];
    store(lanes, exp2_nonpositive<5>(set1(x)));
    return lanes[0];
}

// Calls function(T{}, U{}) with the element type and the unit it is multiplied in.
template <class F>
PYXLBERT_INLINE void with_element(DType dtype, F function) {
    switch (dtype) {
        case DType::float32:
            function(float{}, UnitOf<float>::Type{});
            break;
        case DType::bfloat16:
            function(bf16{}, UnitOf<bf16>::Type{});
            break;
        case DType::float16:
            function(f16{}, UnitOf<f16>::Type{});
            break;
    }
}

// One sequence and head.
template <class T>
struct Plane {
    const T *q, *k, *v;
    std::int64_t q_stride, k_stride, v_stride;
    std::int64_t queries, keys;     // keys: those that are read
    std::int64_t seen_keys;         // those that some query may see
    std::int64_t all_keys;          // including those that none may see
    std::int64_t diagonal;          // causal: query i sees keys 0 .. i + diagonal
    std::int64_t q_first, k_first;  // rows of the (b, t) plane that contiguous tensors start at
    std::int64_t lse_first;         // where this plane's lse starts
    std::uint32_t plane;            // b * H + h
    const std::uint8_t* mask;       // at query 0, key 0
    std::int64_t mask_query, mask_key;
    const void* bias;
    std::int64_t bias_query, bias_key;

    // Keys that query i may see, of the first `limit`.
    PYXLBERT_INLINE std::int64_t visible(std::int64_t i, bool causal, std::int64_t limit) const {
        if (!causal) return limit;
        const std::int64_t n = i + diagonal + 1;
        return n < 0 ? 0 : smaller(n, limit);
    }
};

PYXLBERT_INLINE std::int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <class T>
PYXLBERT_INLINE Plane<T> plane_of(const AttentionCall& a, std::int64_t b, std::int64_t h) {
    Plane<T> p;
    const auto at = [&](const AttentionTensor& x, std::int64_t first) PYXLBERT_LAMBDA {
        return static_cast<const T*>(x.data) + (a.cu_seqlens != nullptr ? first * x.row : b * x.batch) + h * x.head;
    };
    if (a.cu_seqlens != nullptr) {
        p.q_first = p.k_first = a.cu_seqlens[b];
        p.queries = p.keys = p.seen_keys = p.all_keys = a.cu_seqlens[b + 1] - a.cu_seqlens[b];
        p.lse_first = h * a.total + p.q_first;
    } else {
        p.q_first = b * a.queries;
        p.k_first = b * a.keys;
        p.queries = a.queries;
        p.all_keys = a.keys;
        p.keys = p.seen_keys = a.key_lengths != nullptr ? a.key_lengths[b] : a.keys;
        p.lse_first = (b * a.heads + h) * a.queries;
    }
    p.q = at(a.query, p.q_first);
    p.k = at(a.key, p.k_first);
    p.v = at(a.value, p.k_first);
    p.q_stride = a.query.row;
    p.k_stride = a.key.row;
    p.v_stride = a.value.row;
    p.diagonal = p.all_keys - p.queries;
    p.plane = static_cast<std::uint32_t>(b * a.heads + h);
    p.mask = static_cast<const std::uint8_t*>(a.mask.data);
    if (p.mask != nullptr) p.mask += b * a.mask.batch + h * a.mask.head;
    p.mask_query = a.mask.query;
    p.mask_key = a.mask.key;
    p.bias = a.bias.data;
    if (p.bias != nullptr)
        p.bias = static_cast<const char*>(p.bias) + (b * a.bias.batch + h * a.bias.head) * element_size(a.bias_dtype);
    p.bias_query = a.bias.query;
    p.bias_key = a.bias.key;
    return p;
}

// Scores need more than scaling inside the exponent.
PYXLBERT_INLINE bool has_terms(const AttentionCall& a) {
    return a.mask.data != nullptr || a.bias.data != nullptr || !a.options.only_scales();
}

template <class T>
PYXLBERT_INLINE void add_bias(float* s, const T* bias, std::int64_t key_stride, std::int64_t n, float scale) {
    if (key_stride == 0) {
        float one[W] = {};
        store(one, load(bias, 1));
        const Vec b = set1(one[0]);
        for (std::int64_t j = 0; j < n; j += W) store(s + j, fma(load(s + j), set1(scale), b));
        return;
    }
    std::int64_t j = 0;
    for (; j + W <= n; j += W) store(s + j, fma(load(s + j), set1(scale), load(bias + j)));
    if (j < n) store(s + j, fma(load(s + j), set1(scale), load(bias + j, static_cast<int>(n - j))));
}

PYXLBERT_INLINE void apply_mask(float* s, const std::uint8_t* mask, std::int64_t key_stride, std::int64_t n,
                                float masked) {
    if (key_stride == 0) {
        if (*mask == 0)
            for (std::int64_t j = 0; j < n; j += W) store(s + j, set1(masked));
        return;
    }
    for (std::int64_t j = 0; j < n; j += W) {
#if defined(__AVX512F__)
        const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(static_cast<int>(n - j)), mask + j);
        store(s + j, _mm512_mask_mov_ps(set1(masked), _mm_test_epi8_mask(bytes, bytes), load(s + j)));
#else
        const std::int64_t end = smaller(n, j + W);
        for (std::int64_t i = j; i < end; ++i)
            if (mask[i] == 0) s[i] = masked;
#endif
    }
}

// Whether the mask hides some of n keys from j0 on, at most SIZE of them, from every query; those are nonzero in
// `hidden`.  Queries are asked from the last one on: under a causal mask it sees all, and the others are not looked at.
template <std::int64_t SIZE, class T>
PYXLBERT_INLINE bool find_hidden(const Plane<T>& p, std::int64_t j0, std::int64_t n, std::uint8_t* hidden) {
    if (p.mask == nullptr) return false;
    // A copy that nobody else may point to: the loops below are vectors then.
    std::uint8_t seen[SIZE] = {};
    const std::int64_t queries = p.mask_query == 0 ? smaller(1, p.queries) : p.queries;
    bool all = false;
    for (std::int64_t i = queries - 1; i >= 0 && !all; --i) {
        const std::uint8_t* row = p.mask + i * p.mask_query + j0 * p.mask_key;
        if (p.mask_key == 0)
            for (std::int64_t j = 0; j < n; ++j) seen[j] |= *row;
        else
            for (std::int64_t j = 0; j < n; ++j) seen[j] |= row[j];
        if (i % 16 != 0 && i != queries - 1) continue;
        std::int64_t some = 0;
        for (std::int64_t j = 0; j < n; ++j) some += seen[j] != 0;
        all = some == n;
    }
    if (all) return false;
    for (std::int64_t j = 0; j < n; ++j) hidden[j] = seen[j] == 0;
    return true;
}

// Rows of packed values that are not read into a product, those with hidden(j): a NaN in them would survive a weight of
// zero.
template <class U, class F>
PYXLBERT_INLINE void clear_values(std::int64_t n, float* values, std::int64_t columns, F hidden) {
    for (std::int64_t j = 0; j < n; ++j) {
        if (!hidden(j)) continue;
        float* row = values + j / U::PAIR * columns;
        if constexpr (U::PAIR == 1) {
            for (std::int64_t c = 0; c < columns; c += W) store(row + c, zero());
        } else {
            for (std::int64_t c = 0; c < columns; ++c)
                __builtin_memset(reinterpret_cast<char*>(row + c) + j % 2 * 2, 0, 2);
        }
    }
}

// The same of rows that are packed transposed, `units` of W rows together.
template <class F>
PYXLBERT_INLINE void clear_transposed(std::int64_t n, float* rows, std::int64_t units, F hidden) {
    for (std::int64_t j = 0; j < n; ++j)
        if (hidden(j))
            for (std::int64_t u = 0; u < units; ++u) rows[j / W * units * W + u * W + j % W] = 0.0f;
}

// Scores of query i against keys j0 .. j0 + n - 1 in natural units: scale * s + bias, masked ones -inf.
// Lanes from n to the next vector hold anything.
template <class T>
PYXLBERT_INLINE void add_terms(const AttentionCall& a, const Plane<T>& p, float* s, std::int64_t i, std::int64_t j0,
                               std::int64_t n) {
    if (n <= 0) return;
    if (p.bias == nullptr) {
        for (std::int64_t j = 0; j < n; j += W) store(s + j, load(s + j) * set1(a.options.scale));
    } else {
        const std::int64_t first = i * p.bias_query + j0 * p.bias_key;
        if (a.bias_dtype == DType::float32)
            add_bias(s, static_cast<const float*>(p.bias) + first, p.bias_key, n, a.options.scale);
        else if (a.bias_dtype == DType::bfloat16)
            add_bias(s, static_cast<const bf16*>(p.bias) + first, p.bias_key, n, a.options.scale);
        else
            add_bias(s, static_cast<const f16*>(p.bias) + first, p.bias_key, n, a.options.scale);
    }
    if (p.mask != nullptr) apply_mask(s, p.mask + i * p.mask_query + j0 * p.mask_key, p.mask_key, n, -INFINITY_);
}

// s[n .. end - 1] = x; end - n may be anything, and end is a multiple of W.
PYXLBERT_INLINE void fill_from(float* s, std::int64_t n, std::int64_t end, float x) {
    std::int64_t j = n / W * W;
    if (j < n) {
        store(s + j, first_else(load(s + j), static_cast<int>(n - j), set1(x)));
        j += W;
    }
    for (; j < end; j += W) store(s + j, set1(x));
}

#if defined(__AVX512BF16__)
// Two vectors rounded to bfloat16, the first in the lower half.
PYXLBERT_INLINE __m512i round_pair(Vec first, Vec second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
#endif

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
