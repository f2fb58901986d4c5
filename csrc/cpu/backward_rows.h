// What the backward passes of attention and relative attention share: how tiles are cut, and the work on single rows:
// weights again from lse, the gradient of the scores, sums to results.
#pragma once
#include "attention_rows.h"
#include "sums.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

PYXLBERT_INLINE std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Keys of a block.
constexpr std::int64_t BACKWARD_BLOCK = 256;
constexpr std::int64_t SCORE_STRIDE = BACKWARD_BLOCK + 32;

// Products of tiles.  A tile of A cannot be read transposed, so there the sums over queries are transposed,
// dV^T = dO^T P and dK^T = G^T Q: P and G in pairs along the queries are tiles of B as they are.
template <class U>
constexpr bool TILES = U::ROW_STEP == 16;

// Queries of a tile, and what their number is rounded up to.
template <class U>
constexpr std::int64_t TILE = TILES<U> ? 64 : 48;
template <class U>
constexpr std::int64_t ROW_STEP = TILES<U> ? 32 : 2;

// Tiles whose dK and dV are added one after the other: long sums are cut into sums of sums.
constexpr std::int64_t TILES_TOGETHER = 16;

// Strides of transposed sums and operands: odd numbers of cache lines.
constexpr std::int64_t SUM_STRIDE = BACKWARD_BLOCK + W;
template <class U>
constexpr std::int64_t PAIR_STRIDE = TILE<U> / 2 + W;

// Floats for a tile's rows as operands of the sums over queries, and for such a sum over a block of keys.
template <class U>
PYXLBERT_INLINE std::int64_t values_room(std::int64_t columns) {
    return larger(TILE<U> * columns, TILES<U> ? columns * PAIR_STRIDE<U> : 0);
}
template <class U>
PYXLBERT_INLINE std::int64_t sums_room(std::int64_t columns) {
    return larger((BACKWARD_BLOCK + STRIP_ROWS) * columns, TILES<U> ? columns * SUM_STRIDE : 0);
}

// A row of a gradient.  Whole cache lines go past the caches: the caller reads them long after, and to fetch lines
// that are overwritten whole took a quarter of the time of short sequences.
template <class T>
PYXLBERT_INLINE void store_row(T* target, const float* source, std::int64_t d, float scale) {
    std::int64_t c = 0;
#if defined(__AVX512F__)
    if (reinterpret_cast<std::uintptr_t>(target) % 64 == 0) {
        if constexpr (sizeof(T) == 4)
            for (; c + W <= d; c += W) {
                watch_store(target + c, W);
                _mm512_stream_ps(target + c, load(source + c) * set1(scale));
            }
#if defined(__AVX512BF16__)
        if constexpr (UnitOf<T>::Type::PAIR == 2)
            for (; c + 2 * W <= d; c += 2 * W) {
                watch_store(target + c, 2 * W);
                _mm512_stream_si512(reinterpret_cast<__m512i*>(target + c),
                                    round_pair(load(source + c) * set1(scale), load(source + c + W) * set1(scale)));
            }
#endif
    }
#endif
    for (; c + W <= d; c += W) store(target + c, load(source + c) * set1(scale));
    if (c < d) store(target + c, load(source + c) * set1(scale), static_cast<int>(d - c));
}

// W rows of `columns` floats from transposed sums [columns][stride].
PYXLBERT_INLINE void rows_of_sums(const float* sums, std::int64_t stride, std::int64_t columns, float* rows) {
    for (std::int64_t c = 0; c < columns; c += W) {
        Vec block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load(sums + (c + i) * stride);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(rows + i * columns + c, block[i]);
    }
}

// Sums of n keys to rows of dK or dV; `room` is for W rows of `columns`.
template <class T, class U>
PYXLBERT_INLINE void store_sums(T* target, std::int64_t stride, const float* sums, std::int64_t columns, std::int64_t n,
                                std::int64_t d, float scale, [[maybe_unused]] float* room) {
    if constexpr (TILES<U>) {
        for (std::int64_t j = 0; j < n; j += W) {
            rows_of_sums(sums + j, SUM_STRIDE, columns, room);
            for (std::int64_t i = 0; i < smaller(W, n - j); ++i)
                store_row(target + (j + i) * stride, room + i * columns, d, scale);
        }
    } else {
        for (std::int64_t j = 0; j < n; ++j) store_row(target + j * stride, sums + j * columns, d, scale);
    }
}

// Makes the rows of this thread visible to whoever waits for it.
PYXLBERT_INLINE void finish_rows() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

template <class T>
PYXLBERT_INLINE void zero_rows(T* target, std::int64_t stride, std::int64_t rows, std::int64_t d) {
    for (std::int64_t r = 0; r < rows; ++r) __builtin_memset(static_cast<void*>(target + r * stride), 0, d * sizeof(T));
}

// sum(a * b) of d elements
template <class T>
PYXLBERT_INLINE float dot_row(const T* a, const T* b, std::int64_t d) {
    Vec sum = zero();
    std::int64_t c = 0;
    for (; c + W <= d; c += W) sum = fma(load(a + c), load(b + c), sum);
    if (c < d) sum = fma(load(a + c, static_cast<int>(d - c)), load(b + c, static_cast<int>(d - c)), sum);
    return reduce_add(sum);
}

// Two rows of floats, `stride` apart in either matrix, become: at the first row of `weights` its elements in pairs
// along the rows, at its second row those of `gradients`, and in `gradients` both rows in pairs along the columns.  All
// up to `end`, a multiple of 2 W.
PYXLBERT_INLINE void interleave([[maybe_unused]] float* weights, [[maybe_unused]] float* gradients,
                                [[maybe_unused]] std::int64_t stride, [[maybe_unused]] std::int64_t end) {
#if defined(__AVX512BF16__)
    // Lane j of the result takes elements j and j + 16: two rows side by side to pairs.
    alignas(64) static constexpr std::uint16_t ORDER[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i shuffle = _mm512_load_si512(ORDER);
    const auto write = [](float* target, __m512i bits) PYXLBERT_LAMBDA { _mm512_storeu_si512(target, bits); };
    float *s0 = weights, *s1 = s0 + stride, *g0 = gradients, *g1 = g0 + stride;
    for (std::int64_t j = 0; j < end; j += 2 * W) {
#pragma GCC unroll 2
        for (std::int64_t x = j; x < j + 2 * W; x += W) {
            const __m512i pairs = round_pair(load(s0 + x), load(s1 + x));
            write(s0 + x, _mm512_permutexvar_epi16(shuffle, pairs));
            write(s1 + x, _mm512_permutexvar_epi16(shuffle, round_pair(load(g0 + x), load(g1 + x))));
        }
        write(g0 + j / 2, round_pair(load(g0 + j), load(g0 + j + W)));
        write(g1 + j / 2, round_pair(load(g1 + j), load(g1 + j + W)));
    }
#endif
}

// Two rows of n bfloat16 to one of n pairs; n is rounded up to vectors.
PYXLBERT_INLINE void pair_rows([[maybe_unused]] const float* first, [[maybe_unused]] const float* second,
                               [[maybe_unused]] std::int64_t n, [[maybe_unused]] float* target) {
#if defined(__AVX512BF16__)
    const auto bits = [](const float* row, std::int64_t c) PYXLBERT_LAMBDA {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c / 2)));
    };
    for (std::int64_t c = 0; c < n; c += W)
        _mm512_storeu_si512(target + c, _mm512_or_si512(bits(first, c), _mm512_slli_epi32(bits(second, c), 16)));
#endif
}

// exp(scale * s - lse - lse_correction) of one row, or of an inexact one exp(scale * (s - top)) / sum: see Top.  The
// correction is to base 2.
struct Exponent {
    Vec scale, minus_lse, minus_lse_correction;

    // Elements j .. of the row, zero from n on.
    PYXLBERT_INLINE Vec weight(const float* s, std::int64_t j, std::int64_t n) const {
        const Vec w = exp2_nonpositive<5>(fma(fma(load(s + j), scale, minus_lse), set1(LOG2E), minus_lse_correction));
        return j + W <= n ? w : keep_first(w, static_cast<int>(n - j));
    }
};

// From here on lse is too coarse for exp(s - lse).
constexpr float INEXACT_LSE = 64.0f;

// exp(s - lse) has the rounding of lse in it, which grows with |lse| and at the end swallows the number of keys (a row
// whose scores are finfo.min throughout), or is larger than any exponent (scores of 1e10 and more).  Of such rows the
// largest score and the sum of exp(score - largest) are found anew, and stand in for lse.
PYXLBERT_INLINE bool inexact_lse(float lse) {
    const float size = lse < 0.0f ? -lse : lse;
    return size >= INEXACT_LSE && size < INFINITY_;
}

// -lse for the Exponent of a row: nothing of an inexact one, whose scores go through `below_top` before.
PYXLBERT_INLINE float minus_exact_lse(float lse) { return inexact_lse(lse) ? 0.0f : -lse; }

// What stands in for an inexact lse: the score that scale makes the largest, and the sum of exp(scale * (s - top)).
struct Top {
    float& top;
    float& sum;

    // Before the first block.
    PYXLBERT_INLINE void begin(float scale) const {
        top = scale < 0.0f ? INFINITY_ : -INFINITY_;
        sum = 0.0f;
    }

    // n scores of the row; what lies behind them up to a multiple of W is overwritten.
    PYXLBERT_INLINE void add(float* s, std::int64_t n, float scale) const {
        const float sign = scale < 0.0f ? -1.0f : 1.0f;
        fill_from(s, n, round_to(n, W), -sign * INFINITY_);
        Vec best = set1(-INFINITY_);
        for (std::int64_t j = 0; j < n; j += W) best = max(best, load(s + j) * set1(sign));
        const float block = reduce_max(best), before = sign * top, now = block > before ? block : before;
        if (now == -INFINITY_) return;
        const float factor = scale * sign * LOG2E;
        if (now > before) sum = before == -INFINITY_ ? 0.0f : sum * exp2_scalar((before - now) * factor);
        top = sign * now;
        Vec weights = zero();
        for (std::int64_t j = 0; j < n; j += W)
            weights += exp2_nonpositive<5>((load(s + j) * set1(sign) - set1(now)) * set1(factor));
        sum += reduce_add(weights);
    }
};

// n scores of an inexact row less its top.  None is above it, even where another order of adding left one a rounding
// higher than when the top was found.
PYXLBERT_INLINE void below_top(float* s, std::int64_t n, float top, float scale) {
    for (std::int64_t j = 0; j < n; j += W) {
        const Vec x = load(s + j) - set1(top);
        store(s + j, scale < 0.0f ? max(x, zero()) : zero() - max(zero() - x, zero()));
    }
}

// A row of S and dP to P (dropped) and dS; both zero from n to `end`, a multiple of 2 W.  Where one block holds all
// keys, delta is summed here from P and dP: dO . O has the rounding of O in it.  So is the sum of P, which is 1 but for
// what lse's own rounding and another order of adding than forward's leave to all weights of the row; it is divided by.
// i and j0 count dropout's bits; `undropped` is scratch of a row.
PYXLBERT_INLINE void differentiate(const Exponent& exponent, const Dropout& dropout, std::uint32_t plane, float delta,
                                   float* s, float* g, float* undropped, std::int64_t i, std::int64_t j0,
                                   std::int64_t n, std::int64_t end, bool one_block) {
    const auto weight = [&](std::int64_t j) PYXLBERT_LAMBDA { return exponent.weight(s, j, n); };
    // Lanes past the visible keys of dP may be anything, so they are dropped rather than multiplied.
    const auto visible = [&](std::int64_t j, Vec x)
                             PYXLBERT_LAMBDA { return j + W <= n ? x : keep_first(x, static_cast<int>(n - j)); };
    const Vec row_delta = set1(delta);
    if (!one_block && !dropout.active) {
        for (std::int64_t j = 0; j < n; j += W) {
            const Vec w = weight(j);
            store(g + j, visible(j, w * (load(g + j) - row_delta)));
            store(s + j, w);
        }
    } else {
        Vec sum = zero(), all = zero();
        if (dropout.active) {
            for (std::int64_t j = 0; j < n; j += 4 * W) {
                VecU words[4];
                dropout_words(dropout, static_cast<std::uint32_t>(j0 + j), static_cast<std::uint32_t>(i), plane, words);
#pragma GCC unroll 4
                for (int x = 0; x < 4; ++x) {
                    const std::int64_t at = j + x * W;
                    if (at >= n) break;
                    const Vec w = weight(at), dropped = visible(at, drop(dropout, words[x], load(g + at)));
                    sum = fma(w, dropped, sum);
                    all += w;
                    store(g + at, w * (dropped - (one_block ? zero() : row_delta)));
                    store(s + at, drop(dropout, words[x], w));
                    if (one_block) store(undropped + at, w);
                }
            }
        } else {
            for (std::int64_t j = 0; j < n; j += W) {
                const Vec w = weight(j), product = visible(j, w * load(g + j));
                sum += product;
                all += w;
                store(g + j, product);
                store(s + j, w);
            }
        }
        if (one_block) {
            const float total = reduce_add(all);
            const Vec share = set1(total == 0.0f ? 0.0f : 1.0f / total), exact = set1(reduce_add(sum)) * share;
            for (std::int64_t j = 0; j < n; j += W) {
                const Vec dropped = load(s + j) * share;
                const Vec w = dropout.active ? load(undropped + j) * share : dropped;
                store(g + j, load(g + j) * share - w * exact);
                store(s + j, dropped);
            }
        }
    }
    for (std::int64_t j = round_to(n, W); j < end; j += W) {
        store(s + j, zero());
        store(g + j, zero());
    }
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
