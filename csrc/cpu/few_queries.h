// Products of one query with rows as they lie in memory, for calls of so few queries that packing keys and values
// would cost more than multiplying them.
#pragma once
#include "simd.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// s[j] = (ADD: s[j] +) q . row j, of n rows of d elements; q is zero from d to the next vector.
template <bool ADD, class T>
PYXLBERT_INLINE void multiply_rows(const float* q, const T* rows, std::int64_t stride, std::int64_t n, std::int64_t d,
                                   float* s) {
    // Four rows at once: the sums over a vector's lanes wait for each other less.
    constexpr int ROWS = 4;
    const std::int64_t whole = d / W * W;
    const int left = static_cast<int>(d - whole);
    std::int64_t j = 0;
    for (; j + ROWS <= n; j += ROWS) {
        const T* row = rows + j * stride;
        Vec sum[ROWS] = {zero(), zero(), zero(), zero()};
        for (std::int64_t c = 0; c < whole; c += W) {
            const Vec x = load(q + c);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sum[r] = fma(x, load(row + r * stride + c), sum[r]);
        }
        if (left > 0) {
            const Vec x = load(q + whole);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sum[r] = fma(x, load(row + r * stride + whole, left), sum[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) s[j + r] = (ADD ? s[j + r] : 0.0f) + reduce_add(sum[r]);
    }
    for (; j < n; ++j) {
        const T* row = rows + j * stride;
        Vec sum = zero();
        for (std::int64_t c = 0; c < whole; c += W) sum = fma(load(q + c), load(row + c), sum);
        if (left > 0) sum = fma(load(q + whole), load(row + whole, left), sum);
        s[j] = (ADD ? s[j] : 0.0f) + reduce_add(sum);
    }
}

// out = factor out + sum of w[j] row j; a factor of 0 forgets what out holds.  Rows of weight 0 are not read.  No more
// than 64 rows are summed in one chain.
template <class T>
PYXLBERT_INLINE void add_weighted_rows(const float* w, const T* rows, std::int64_t stride, std::int64_t n,
                                       std::int64_t d, float factor, float* out) {
    constexpr int VECTORS = 4, ROWS = 64;
    for (std::int64_t c0 = 0; c0 < d; c0 += VECTORS * W) {
        const bool whole = c0 + VECTORS * W <= d;
        Vec total[VECTORS] = {zero(), zero(), zero(), zero()};
        for (std::int64_t j0 = 0; j0 < n; j0 += ROWS) {
            Vec sum[VECTORS] = {zero(), zero(), zero(), zero()};
            for (std::int64_t j = j0; j < n && j < j0 + ROWS; ++j) {
                if (w[j] == 0.0f) continue;
                const T* row = rows + j * stride + c0;
                const Vec x = set1(w[j]);
                if (whole) {
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) sum[v] = fma(x, load(row + v * W), sum[v]);
                } else {
                    for (int v = 0; c0 + v * W < d; ++v)
                        sum[v] = fma(x, load(row + v * W, static_cast<int>(d - c0 - v * W)), sum[v]);
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) total[v] += sum[v];
        }
        for (int v = 0; v < VECTORS && c0 + v * W < d; ++v) {
            float* target = out + c0 + v * W;
            store(target, factor == 0.0f ? total[v] : fma(load(target), set1(factor), total[v]));
        }
    }
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
