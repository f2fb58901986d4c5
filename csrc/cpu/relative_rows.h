// The work of relative attention on single rows: biased queries, and what a row of scores gets beside the products.
#pragma once
#include "attention_rows.h"
#include "relative_attention.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// What XLNet adds to the scores of keys that must not be seen.  It swallows the score, so that a row of nothing but
// such scores has equal weights.
constexpr float UNIFORM_SCORE = -1e30f;
constexpr std::int32_t UNSEEN_RANK = INT32_MAX;

// The queries of one sequence and head in one stream.
template <class T>
struct Queries {
    const T* data;
    std::int64_t stride, count;
    std::int64_t first, lse_first;  // where the sequence begins in the contiguous out and lse
    const std::int32_t *positions, *order, *rank, *segment;
};

template <class T>
PYXLBERT_INLINE Queries<T> queries_of(const AttentionCall& in, const Stream& rows, std::int64_t b, std::int64_t h) {
    Queries<T> x;
    const bool packed = in.cu_seqlens != nullptr;
    x.first = packed ? in.cu_seqlens[b] : b * rows.count;
    // An absent stream has no rows in any sequence.
    x.count = packed && rows.count > 0 ? in.cu_seqlens[b + 1] - in.cu_seqlens[b] : rows.count;
    x.lse_first = packed ? h * in.total + x.first : (b * in.heads + h) * rows.count;
    x.data = static_cast<const T*>(rows.query.data) + (packed ? x.first * rows.query.row : b * rows.query.batch) +
             h * rows.query.head;
    x.stride = rows.query.row;
    const auto of_sequence = [&](const std::int32_t* all)
                                 PYXLBERT_LAMBDA { return all == nullptr ? nullptr : all + x.first; };
    x.positions = of_sequence(rows.positions);
    x.order = of_sequence(rows.order);
    x.rank = of_sequence(rows.rank);
    x.segment = of_sequence(rows.segment);
    return x;
}

// The first of a stream's rows, by rising position, that stands at `place` or behind.
template <class T>
PYXLBERT_INLINE std::int64_t first_at(const Queries<T>& x, std::int64_t place) {
    if (x.positions == nullptr) return smaller(place, x.count);
    std::int64_t low = 0, high = x.count;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        x.positions[x.order[middle]] < place ? low = middle + 1 : high = middle;
    }
    return low;
}

PYXLBERT_INLINE bool has_relative_terms(const RelativeCall* a) {
    return a != nullptr && (a->key_rank != nullptr || a->segment_embedding != nullptr || a->options.uniform_rows);
}

PYXLBERT_INLINE const float* of_head(const float* bias, std::int64_t h, std::int64_t d) {
    return bias == nullptr ? nullptr : bias + h * d;
}

template <class T>
PYXLBERT_INLINE Vec load_biased(const T* x, const float* bias, std::int64_t c, std::int64_t d) {
    if (c + W <= d) return load(x + c) + load(bias + c);
    if (c >= d) return zero();
    const int left = static_cast<int>(d - c);
    return load(x + c, left) + load(bias + c, left);
}

// A row of A: a query plus its bias as units, zero past d.
template <class T, class U>
PYXLBERT_INLINE void pack_query(const T* x, const float* bias, std::int64_t d, float* target, std::int64_t k_units) {
    if (bias == nullptr) {
        pack_rows<T, U>(x, 0, 1, d, target, 0, k_units);
        return;
    }
    for (std::int64_t u = 0; u < k_units; u += W) {
#if defined(__AVX512BF16__)
        if constexpr (U::PAIR == 2) {
            const Vec first = load_biased(x, bias, 2 * u, d), second = load_biased(x, bias, 2 * u + W, d);
            _mm512_storeu_si512(target + u, round_pair(first, second));
            continue;
        }
#endif
        store(target + u, load_biased(x, bias, u, d));
    }
}

// (q + segment_bias) . segment_embedding
template <class T>
PYXLBERT_INLINE float segment_score(const T* x, const float* bias, const float* embedding, std::int64_t d) {
    Vec sum = zero();
    for (std::int64_t c = 0; c < d; c += W) {
        const int left = d - c < W ? static_cast<int>(d - c) : W;
        Vec q = left == W ? load(x + c) : load(x + c, left);
        if (bias != nullptr) q += left == W ? load(bias + c) : load(bias + c, left);
        sum = fma(q, left == W ? load(embedding + c) : load(embedding + c, left), sum);
    }
    return reduce_add(sum);
}

// The sum of a row's scores at keys of its own segment; n is rounded up to vectors, the row is zero there.
PYXLBERT_INLINE float sum_of_segment(const float* g, const std::int32_t* segments, std::int32_t segment,
                                     std::int64_t n) {
#if defined(__AVX512F__)
    Vec sum = zero();
    for (std::int64_t j = 0; j < n; j += W) {
        const __m512i keys = _mm512_maskz_loadu_epi32(first_lanes(static_cast<int>(n - j)), segments + j);
        sum = sum + _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(keys, _mm512_set1_epi32(segment)), load(g + j));
    }
    return reduce_add(sum);
#else
    float lanes[W] = {};
    for (std::int64_t j = 0; j < n; ++j)
        if (segments[j] == segment) lanes[j % W] += g[j];
    return reduce_add(load(lanes));
#endif
}

// Of n keys from j0 on, those up to the last one that some row may see; `index` has the rows' numbers in their stream.
template <class T>
PYXLBERT_INLINE std::int64_t keys_in_sight(const RelativeCall& a, const Plane<T>& p, const Queries<T>& x, bool see_self,
                                           const std::int32_t* index, std::int64_t rows, std::int64_t j0,
                                           std::int64_t n) {
    if (a.key_rank == nullptr || a.options.uniform_rows) return n;
    std::int32_t highest = x.rank[index[0]];
    std::int64_t itself = 0;  // up to the last row's own key
    for (std::int64_t r = 0; r < rows; ++r) {
        highest = x.rank[index[r]] > highest ? x.rank[index[r]] : highest;
        const std::int64_t own = index[r] + p.diagonal - j0;
        if (see_self && own >= itself && own < n) itself = own + 1;
    }
    const std::int32_t* ranks = a.key_rank + p.k_first + j0;
    while (n > itself && ranks[n - 1] >= highest) --n;
    return n;
}

struct SegmentScores {
    float same, other;
};

// Vector j of a row: x plus the segment's score, times scale; `masked` where the key's rank is not below the row's.
// Lanes past n hold anything.
PYXLBERT_INLINE Vec relative_terms(Vec x, const std::int32_t* segments, std::int32_t segment, SegmentScores score,
                                   float scale, const std::int32_t* ranks, std::int32_t rank, float masked, int n) {
#if defined(__AVX512F__)
    const __mmask16 lanes = first_lanes(n);
    if (segments != nullptr) {
        const __m512i keys = _mm512_maskz_loadu_epi32(lanes, segments);
        const __mmask16 same = _mm512_cmpeq_epi32_mask(keys, _mm512_set1_epi32(segment));
        x = x + _mm512_mask_mov_ps(set1(score.other), same, set1(score.same));
    }
    x = x * set1(scale);
    if (ranks != nullptr) {
        const __m512i keys = _mm512_maskz_loadu_epi32(lanes, ranks);
        x = _mm512_mask_mov_ps(set1(masked), _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(rank)), x);
    }
    return x;
#else
    float lanes[W];
    store(lanes, x);
    for (int i = 0; i < W && i < n; ++i) {
        if (segments != nullptr) lanes[i] += segments[i] == segment ? score.same : score.other;
        lanes[i] *= scale;
        if (ranks != nullptr && ranks[i] >= rank) lanes[i] = masked;
    }
    return load(lanes);
#endif
}

// Scores of query i against keys j0 .. j0 + n - 1 in natural units, masked ones -inf or UNIFORM_SCORE.
template <class T>
PYXLBERT_INLINE void add_relative_terms(const RelativeCall& a, const Plane<T>& p, float* s, SegmentScores score,
                                        const std::int32_t* query_ranks, const std::int32_t* query_segments,
                                        bool see_self, std::int64_t i, std::int64_t mask_row, std::int64_t j0,
                                        std::int64_t n) {
    if (n <= 0) return;
    const float masked = a.options.uniform_rows ? UNIFORM_SCORE : -INFINITY_, scale = a.in.options.scale;
    const std::int32_t* ranks = a.key_rank == nullptr ? nullptr : a.key_rank + p.k_first + j0;
    const std::int32_t* segments = a.segment_embedding == nullptr ? nullptr : a.key_segments + p.k_first + j0;
    const std::int32_t rank = ranks == nullptr ? 0 : query_ranks[i];
    const std::int32_t segment = segments == nullptr ? 0 : query_segments[i];
    const std::int64_t self = i + p.diagonal - j0;
    const bool sees = see_self && self >= 0 && self < n && (ranks == nullptr || ranks[self] != UNSEEN_RANK);
    float own = 0.0f;
    if (sees) {
        own = s[self];
        if (segments != nullptr) own += segments[self] == segment ? score.same : score.other;
        own *= scale;
    }
    for (std::int64_t j = 0; j < n; j += W) {
        const int left = n - j < W ? static_cast<int>(n - j) : W;
        store(s + j, relative_terms(load(s + j), segments == nullptr ? nullptr : segments + j, segment, score, scale,
                                    ranks == nullptr ? nullptr : ranks + j, rank, masked, left));
    }
    if (p.mask != nullptr) apply_mask(s, p.mask + mask_row * p.mask_query + j0 * p.mask_key, p.mask_key, n, masked);
    if (sees) s[self] = own;
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
