// Scores of a tile: which sequence, which queries, what masks and adds to them, dropout's bits.
//
// i numbers queries, j keys, both within their sequence.  Scores are rounded before the largest, or lse, is subtracted:
// where one key outweighs all others, lse is its score to the last bit, and its weight in backward exactly 1, however
// large the scores are.  A factor of log2(e) from the start, or a multiplication fused with the subtraction, would lose
// that.
#pragma once
#include "cuda/attention_arguments.h"
#include "cuda/philox.cuh"
#include "cuda/tiles.cuh"

namespace pyxlbert::cuda {

constexpr float LOG2E = 1.4426950408889634f;
constexpr std::int32_t UNSEEN_RANK = 0x7fffffff;  // of a key that no row may see
constexpr float UNIFORM_SCORE = -1e30f;           // of what is masked where a row without any key averages
constexpr float INEXACT_LSE = 64.0f;              // from here on lse is too coarse for exp(s - lse)

// e^(a - b).
DEVICE float exp_of_difference(float a, float b) { return exp2_approx(__fmul_rn(__fsub_rn(a, b), LOG2E)); }

// One sequence of the batch.
struct Sequence {
    std::int64_t start;  // its first packed row, or 0
    int queries, keys;   // keys: those that lengths leave
    int extent;          // keys that are there
    int shift;           // causal, and itself: key i + shift
    bool wrong;          // the numbers that say so are out of range: they are brought into it, and the rows become NaN
};

DEVICE Sequence sequence_of(const AttentionCall& a, int b) {
    Sequence s = {0, a.queries, a.keys, a.keys, a.keys - a.queries, false};
    if (a.cu_seqlens != nullptr) {
        const std::int64_t first = a.cu_seqlens[b], last = a.cu_seqlens[b + 1];
        s.start = first < 0 ? 0 : first > a.total ? a.total : first;
        const std::int64_t end = last < s.start ? s.start : last > a.total ? a.total : last;
        s.wrong = first < 0 || last < first || last > a.total || end - s.start > a.queries;
        s.queries = static_cast<int>(end - s.start < a.queries ? end - s.start : a.queries);
        s.keys = s.extent = s.queries;
    }
    if (a.key_lengths != nullptr) {
        const int length = a.key_lengths[b];
        s.wrong = s.wrong || length < 0 || length > s.keys;
        s.keys = length < 0 ? 0 : min(length, s.keys);
    }
    return s;
}

// A matrix of one sequence and head.
template <class T>
DEVICE const T* plane_of(const Heads& x, int b, int h, std::int64_t start) {
    return static_cast<const T*>(x.data) + b * x.batch + start * x.row + h * x.head;
}

// Rows of a contiguous result of `rows` queries or keys a sequence.
DEVICE std::int64_t result_row(const AttentionCall& a, int b, int h, std::int64_t start, int rows, int row) {
    return ((a.cu_seqlens == nullptr ? static_cast<std::int64_t>(b) * rows : start) + row) * a.heads + h;
}

// Of lse and its like, row 0 of a sequence.
DEVICE std::int64_t statistics_at(const AttentionCall& a, int b, int h, std::int64_t start, int rows) {
    return a.cu_seqlens == nullptr ? (static_cast<std::int64_t>(b) * a.heads + h) * rows : h * a.total + start;
}

// Of [B, rows] or packed, row 0 of a sequence.
DEVICE const std::int32_t* numbers_of(const AttentionCall& a, const std::int32_t* x, int b, std::int64_t start,
                                      int rows) {
    return x == nullptr ? nullptr : x + (a.cu_seqlens == nullptr ? static_cast<std::int64_t>(b) * rows : start);
}

// What every element of a tile is asked for, with the sequence's share of each tensor.
struct Masks {
    const unsigned char* mask;
    std::int64_t mask_query, mask_key;
    const void* bias;
    std::int64_t bias_at, bias_query, bias_key;
    DType bias_dtype;
    const std::int32_t *key_rank, *key_segments;
    bool causal, uniform_rows, see_self;
    int keys, extent, shift;
    float scale;
    // of dropout
    std::uint64_t seed;
    std::uint32_t threshold, plane;
    Tag tag;
    bool drops;
};

// They lie in shared memory, since they are the same for all threads and would take thirty registers.
constexpr std::size_t MASKS_SIZE = (sizeof(Masks) + 15) / 16 * 16;

DEVICE Masks masks_of(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int h) {
    Masks m;
    m.mask = a.mask.data == nullptr
                 ? nullptr
                 : static_cast<const unsigned char*>(a.mask.data) + b * a.mask.batch + h * a.mask.head;
    m.mask_query = a.mask.query;
    m.mask_key = a.mask.key;
    m.bias = a.bias.data;
    m.bias_at = b * a.bias.batch + h * a.bias.head;
    m.bias_query = a.bias.query;
    m.bias_key = a.bias.key;
    m.bias_dtype = a.bias_dtype;
    m.key_rank = numbers_of(a, a.key_rank, b, s.start, a.keys);
    m.key_segments = numbers_of(a, a.key_segments, b, s.start, a.keys);
    m.causal = a.options.causal;
    m.uniform_rows = a.relative.uniform_rows;
    m.see_self = stream.options.see_self;
    m.keys = s.keys;
    m.extent = s.extent;
    m.shift = s.shift;
    m.scale = a.options.scale;
    m.drops = a.dropout.seed != nullptr;
    m.seed = m.drops ? static_cast<std::uint64_t>(*a.dropout.seed) : 0;
    m.threshold = a.dropout.threshold;
    m.plane = static_cast<std::uint32_t>(b * a.heads + h);
    m.tag = stream.options.tag;
    return m;
}

// A query of a window, in shared memory: a thread looks at two of them again and again, and registers are short.
struct Place {
    int number;    // -1: there is none
    int position;  // one of the 16 of its warp, also where there is none
    int mask_row;
    int rank, segment;
    float same, other;                 // the products with the two segment embeddings
    float lse, delta, lse_correction;  // in backward
};

// Whether row i may attend key j, 0 <= j.
template <bool EXTRAS>
DEVICE bool allowed(const Masks& m, const Place& line, int j) {
    bool may = j < m.keys && line.number >= 0;
    if (m.causal) may = may && j <= line.number + m.shift;
    if constexpr (EXTRAS) {
        if (m.mask != nullptr && may) may = m.mask[line.mask_row * m.mask_query + j * m.mask_key] != 0;
        std::int32_t order = 0;
        if (m.key_rank != nullptr && j < m.keys) {
            order = m.key_rank[j];
            may = may && line.rank > order;
        }
        if (m.see_self)
            may = may || (j == line.number + m.shift && j < m.keys && line.number >= 0 && order != UNSEEN_RANK);
    }
    return may;
}

// A product as a score: with the terms of segments and bias, scaled; -inf where j may not be attended.
template <bool EXTRAS>
DEVICE float score_of(const Masks& m, const Place& line, int j, float product) {
    float s = product;
    if constexpr (EXTRAS) {
        if (m.key_segments != nullptr && j >= 0 && j < m.extent)
            s += m.key_segments[j] != line.segment ? line.other : line.same;
    }
    s = __fmul_rn(s, m.scale);
    const bool may = j >= 0 && allowed<EXTRAS>(m, line, j);
    if constexpr (EXTRAS) {
        if (m.bias != nullptr && may) {
            float more[1];
            load_any<1>(m.bias, m.bias_dtype, m.bias_at + line.mask_row * m.bias_query + j * m.bias_key, more);
            s = __fadd_rn(s, more[0]);
        }
        if (m.uniform_rows) {
            const bool real = j >= 0 && j < m.extent && line.number >= 0;
            return may ? s : real ? UNIFORM_SCORE : -INFINITY_;
        }
    }
    return may ? s : -INFINITY_;
}

// Bit 4 n + e: whether weight c[n][e] of a tile survives dropout; lines of rows l / 4 and l / 4 + 8, keys from first_j.
// A lane draws one of its two rows, and its neighbour the other: each needs two of the four words of both.
template <int N>
DEVICE std::uint32_t kept_bits(const Masks& m, int number0, int number1, int first_j) {
    static_assert(N <= 8);
    const int t = lane_id() % 4;
    const bool odd = (t & 1) != 0;
    std::uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const std::uint32_t block = static_cast<std::uint32_t>(first_j / 4 + n * 2 + t / 2);
        const Words w = philox(m.seed, block, static_cast<std::uint32_t>(odd ? number1 : number0), m.plane, m.tag);
        const std::uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? w.word[0] : w.word[2], 1);
        const std::uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? w.word[1] : w.word[3], 1);
        const std::uint32_t mine[4] = {odd ? x : w.word[0], odd ? y : w.word[1], odd ? w.word[2] : x,
                                       odd ? w.word[3] : y};
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (mine[e] >= m.threshold) bits |= 1u << (4 * n + e);
    }
    return bits;
}

// Whether one weight survives.
DEVICE bool kept(const Masks& m, int number, int j) {
    const Words w =
        philox(m.seed, static_cast<std::uint32_t>(j / 4), static_cast<std::uint32_t>(number), m.plane, m.tag);
    const int k = j & 3;
    const std::uint32_t word = k == 0 ? w.word[0] : k == 1 ? w.word[1] : k == 2 ? w.word[2] : w.word[3];
    return word >= m.threshold;
}

}  // namespace pyxlbert::cuda
