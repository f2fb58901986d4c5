// Scores of a tile: which sequence, which queries, what masks and adds to them, dropout's bits.
//
// i numbers queries, j keys, both within their sequence.  Scores are rounded before the largest, or lse, is subtracted:
// where one key outweighs all others, lse is its score to the last bit, and its weight in backward exactly 1, however
// large the scores are.  A factor of log2(e) from the start, or a multiplication fused with the subtraction, would lose
// that.
#pragma once
#include "cuda/features.h"
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

// What decides the dropout bits of one sequence and head, beside a weight's row and column.
struct Draws {
    std::uint64_t seed;
    std::uint32_t threshold, plane;
    Tag tag;
};

DEVICE Draws draws_of(const AttentionCall& a, const Stream& stream, int b, int h) {
    return {a.dropout.seed == nullptr ? 0 : static_cast<std::uint64_t>(*a.dropout.seed), a.dropout.threshold,
            static_cast<std::uint32_t>(b * a.heads + h), stream.options.tag};
}

// What every element of a tile is asked for, with the sequence's share of each tensor; what a set of features does not
// ask for is not there.
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
    bool drops;
    Draws draws;
};

// They lie in shared memory, since they are the same for all threads and would take thirty registers.
constexpr std::size_t MASKS_SIZE = (sizeof(Masks) + 15) / 16 * 16;

template <class F>
DEVICE void find_masks(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int h, Masks& m) {
    if constexpr (F::MASK) {
        m.mask = a.mask.data == nullptr
                     ? nullptr
                     : static_cast<const unsigned char*>(a.mask.data) + b * a.mask.batch + h * a.mask.head;
        m.mask_query = a.mask.query;
        m.mask_key = a.mask.key;
    }
    if constexpr (F::BIAS) {
        m.bias = a.bias.data;
        m.bias_at = b * a.bias.batch + h * a.bias.head;
        m.bias_query = a.bias.query;
        m.bias_key = a.bias.key;
        m.bias_dtype = a.bias_dtype;
    }
    if constexpr (F::RANKS) m.key_rank = numbers_of(a, a.key_rank, b, s.start, a.keys);
    if constexpr (F::SEGMENTS) m.key_segments = numbers_of(a, a.key_segments, b, s.start, a.keys);
    if constexpr (F::UNIFORM_ROWS) m.uniform_rows = a.relative.uniform_rows;
    if constexpr (F::SEE_SELF) m.see_self = stream.options.see_self;
    m.causal = a.options.causal;
    m.keys = s.keys;
    m.extent = s.extent;
    m.shift = s.shift;
    m.scale = a.options.scale;
    if constexpr (F::DROPOUT) {
        m.drops = a.dropout.seed != nullptr;
        m.draws = draws_of(a, stream, b, h);
    }
}

// A query of a window, in shared memory: a thread looks at two of them again and again, and registers are short.
struct Place {
    int number;    // -1: there is none
    int position;  // one of the 16 of its warp, also where there is none
    int mask_row;
    int rank, segment;
    float same, other;                 // the products with the two segment embeddings
    float lse, delta, lse_correction;  // in backward; in forward the largest score so far, and the sum of the weights
};

// Of a warp's tile of 16 by 8 N scores a thread has c[n][e], e < 2 of its upper line and the others of its lower one,
// whose key is first[e / 2] + 8 n + e % 2.  What is asked of each of them is a bit, 4 n + e, and whatever is the same
// for all of them is asked once.  SKEWED: the two lines have keys of their own.
template <int N>
constexpr std::uint32_t ALL_SCORES = 0xffffffffu >> (32 - 4 * N);

enum class Tile {
    EMPTY,  // nobody may attend anything: it is left out
    EDGE,   // some may, or where a row without any key averages over all of them
    WHOLE,  // everybody may attend everything
};

// Whether more hides keys than lengths and the diagonal.
template <class F>
DEVICE bool hides(const Masks& m) {
    return (F::MASK && m.mask != nullptr) || (F::RANKS && m.key_rank != nullptr);
}

// Whether keys are not read that their rank hides from all rows: a row without any key averages over them too.
template <class F>
HOST_DEVICE bool leaves_hidden_keys(const AttentionCall& a) {
    return F::RANKS && !(F::UNIFORM_ROWS && a.relative.uniform_rows);
}

// Keys of a row from 0 on that lengths and the diagonal leave.
DEVICE int end_of(const Masks& m, const Place& line) {
    if (line.number < 0) return 0;
    return m.causal ? max(min(m.keys, line.number + m.shift + 1), 0) : m.keys;
}

// Which scores are of keys that their rows may attend.
template <class F, bool SKEWED, int N>
DEVICE std::uint32_t attended(const Masks& m, const Place& upper, const Place& lower, const int (&first)[2]) {
    std::uint32_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned end = static_cast<unsigned>(end_of(m, half == 0 ? upper : lower));
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                // A key before the first is a large number.
                if (static_cast<unsigned>(first[half] + n * 8 + e) < end) bits |= 1u << (4 * n + 2 * half + e);
    }
    if constexpr (F::MASK) {
        if (m.mask != nullptr) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Place& line = half == 0 ? upper : lower;
                const unsigned char* row = m.mask + line.mask_row * m.mask_query + first[half] * m.mask_key;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const std::uint32_t bit = 1u << (4 * n + 2 * half + e);
                        unsigned char may = 1;
                        if ((bits & bit) != 0) may = row[(n * 8 + e) * m.mask_key];
                        if (may == 0) bits &= ~bit;
                    }
            }
        }
    }
    if constexpr (F::RANKS) {
        if (m.key_rank != nullptr) {
            const int ranks[2] = {upper.rank, lower.rank};
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (!SKEWED && e >= 2) continue;
                    // The key of c[n][e], and unskewed of c[n][e + 2] too.
                    const std::uint32_t bit = 1u << (4 * n + e), both = SKEWED ? bit : bit | bit << 2;
                    std::int32_t order = UNSEEN_RANK;
                    if ((bits & both) != 0) order = m.key_rank[first[e / 2] + n * 8 + (e & 1)];
                    if (ranks[e / 2] <= order) bits &= ~bit;
                    if (!SKEWED && ranks[1] <= order) bits &= ~(bit << 2);
                }
        }
    }
    if constexpr (F::SEE_SELF) {
        if (m.see_self && hides<F>(m)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Place& line = half == 0 ? upper : lower;
                const int j = line.number + m.shift, at = j - first[half];
                if (line.number >= 0 && at >= 0 && at < 8 * N && at % 8 < 2 && j >= 0 && j < m.keys &&
                    (!F::RANKS || m.key_rank == nullptr || m.key_rank[j] != UNSEEN_RANK))
                    bits |= 1u << (at / 8 * 4 + 2 * half + at % 8);
            }
        }
    }
    return bits;
}

// What a tile is, the same for the whole warp, and with ASKS_FIRST `bits`, what `attended` says.
template <class F, bool SKEWED, int N>
DEVICE Tile tile_of(std::uint32_t& bits, const Masks& m, const Place& upper, const Place& lower,
                    const int (&first)[2]) {
    // The lines' keys, of which a thread has some.
    const int begin[2] = {first[0] - lane_id() % 4 * 2, first[1] - lane_id() % 4 * 2};
    const int end[2] = {end_of(m, upper), end_of(m, lower)};
    bits = ALL_SCORES<N>;
    if (!hides<F>(m)) {
        const bool whole = min(begin[0], begin[1]) >= 0 && min(end[0] - begin[0], end[1] - begin[1]) >= 8 * N;
        if (!__any_sync(0xffffffffu, !whole)) return Tile::WHOLE;
    }
    bool some = false;
    if constexpr (ASKS_FIRST<F>) {
        bits = attended<F, SKEWED, N>(m, upper, lower, first);
        // A row without any key averages over all of them.
        some = bits != 0 || (F::UNIFORM_ROWS && m.uniform_rows);
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) some = some || max(begin[half], 0) < min(begin[half] + 8 * N, end[half]);
    }
    return __any_sync(0xffffffffu, some) ? Tile::EDGE : Tile::EMPTY;
}

// Adds the bias, whose elements are of type B, where a key may be attended.
template <class B, int N>
DEVICE void add_bias_of_scores(float (&c)[N][4], std::uint32_t bits, const Masks& m, const Place& upper,
                               const Place& lower, const int (&first)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const B* row = static_cast<const B*>(m.bias) + m.bias_at + (half == 0 ? upper : lower).mask_row * m.bias_query +
                       first[half] * m.bias_key;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if ((bits >> (4 * n + 2 * half + e) & 1) != 0) {
                    float& x = c[n][2 * half + e];
                    x = __fadd_rn(x, to_float(row[(n * 8 + e) * m.bias_key]));
                }
    }
}

// Products as scores: with the terms of segments and bias, scaled; -inf where a key may not be attended.  T: of the
// query, and of a bias that is not float32.
template <class T, class F, bool SKEWED, int N>
DEVICE void scores_of(float (&c)[N][4], Tile tile, std::uint32_t bits, const Masks& m, const Place& upper,
                      const Place& lower, const int (&first)[2]) {
    if constexpr (F::SEGMENTS) {
        if (m.key_segments != nullptr) {
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (!SKEWED && e >= 2) continue;
                    const int j = first[e / 2] + n * 8 + (e & 1);
                    std::int32_t segment = 0;
                    if (static_cast<unsigned>(j) < static_cast<unsigned>(m.extent)) segment = m.key_segments[j];
                    const Place& line = e < 2 ? upper : lower;
                    c[n][e] += segment != line.segment ? line.other : line.same;
                    if (!SKEWED) c[n][e + 2] += segment != lower.segment ? lower.other : lower.same;
                }
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] = __fmul_rn(c[n][e], m.scale);
    if constexpr (F::BIAS) {
        if (m.bias != nullptr) {
            if (m.bias_dtype == DType::float32)
                add_bias_of_scores<float, N>(c, bits, m, upper, lower, first);
            else
                add_bias_of_scores<T, N>(c, bits, m, upper, lower, first);
        }
    }
    if (tile == Tile::WHOLE) return;
    // Not kept from before the products, since registers are short.
    if constexpr (!ASKS_FIRST<F>) bits = attended<F, SKEWED, N>(m, upper, lower, first);
    if (F::UNIFORM_ROWS && m.uniform_rows) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int j = first[e / 2] + n * 8 + (e & 1);
                const bool real =
                    static_cast<unsigned>(j) < static_cast<unsigned>(m.extent) && (e < 2 ? upper : lower).number >= 0;
                if ((bits >> (4 * n + e) & 1) == 0) c[n][e] = real ? UNIFORM_SCORE : -INFINITY_;
            }
    } else {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if ((bits >> (4 * n + e) & 1) == 0) c[n][e] = -INFINITY_;
    }
}

// Bit 4 n + e: whether weight c[n][e] of a tile survives dropout; lines of rows l / 4 and l / 4 + 8, keys from first_j.
// A lane draws one of its two rows, and its neighbour the other: each needs two of the four words of both.
template <int N>
DEVICE std::uint32_t kept_bits(const Draws& d, int number0, int number1, int first_j) {
    static_assert(N <= 8);
    const int t = lane_id() % 4;
    const bool odd = (t & 1) != 0;
    std::uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const std::uint32_t block = static_cast<std::uint32_t>(first_j / 4 + n * 2 + t / 2);
        const Words w = philox(d.seed, block, static_cast<std::uint32_t>(odd ? number1 : number0), d.plane, d.tag);
        const std::uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? w.word[0] : w.word[2], 1);
        const std::uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? w.word[1] : w.word[3], 1);
        const std::uint32_t mine[4] = {odd ? x : w.word[0], odd ? y : w.word[1], odd ? w.word[2] : x,
                                       odd ? w.word[3] : y};
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (mine[e] >= d.threshold) bits |= 1u << (4 * n + e);
    }
    return bits;
}

// The same where each of the two lines has keys of its own, from0 and from1 on, the same for the four lanes of a line.
// They begin anywhere within a block of four, so that 8 N keys lie in 2 N + 1 blocks: the four lanes draw those of both
// lines, each block once, and put them together.
template <int N>
DEVICE std::uint32_t kept_bits_skewed(const Draws& d, int number0, int number1, int from0, int from1) {
    static_assert(N <= 4);
    constexpr int BLOCKS = 2 * N + 1, CALLS = (2 * BLOCKS + 3) / 4;
    const int t = lane_id() % 4;
    // Of either line, bit k of key from + k.
    std::uint32_t upper = 0, lower = 0;
#pragma unroll
    for (int call = 0; call < CALLS; ++call) {
        const int block = call * 4 + t;
        const bool second = block >= BLOCKS;
        const int at = second ? block - BLOCKS : block, from = second ? from1 : from0;
        const Words w = philox(d.seed, static_cast<std::uint32_t>((from >> 2) + at),
                               static_cast<std::uint32_t>(second ? number1 : number0), d.plane, d.tag);
        std::uint32_t four = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (w.word[k] >= d.threshold) four |= 1u << k;
        const std::uint32_t line =
            static_cast<std::uint32_t>((static_cast<std::uint64_t>(four) << 4 * at) >> (from & 3));
        if (!second) upper |= line;
        if (second && at < BLOCKS) lower |= line;
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
        upper |= __shfl_xor_sync(0xffffffffu, upper, offset);
        lower |= __shfl_xor_sync(0xffffffffu, lower, offset);
    }
    std::uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
        bits |= (upper >> (8 * n + 2 * t) & 3) << (4 * n) | (lower >> (8 * n + 2 * t) & 3) << (4 * n + 2);
    return bits;
}

}  // namespace pyxlbert::cuda
