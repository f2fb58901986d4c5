// Attention, forward: softmax(scale * q k^T + bias, masked) v, no score ever in main memory.
//
// A task is one (sequence, head), or a run of its query tiles when there are too few heads for the
// threads.  Keys and values are packed once a task into the layouts of gemm_tile.h.  Then, for every
// tile of queries and block of keys: scores (a tile of floats in the second-level cache), softmax row by
// row with a running maximum and sum, weighted sum of the values.  bfloat16 weights are written over
// their own scores.  A row's result does not depend on how the queries are cut, so the number of threads
// may decide that.
#include "../workspace.h"
#include "attention_rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

constexpr std::int64_t kBlock = 512;
constexpr std::int64_t kScoreStride = kBlock + 32;  // not a power of two: rows would share cache sets

// Queries of a tile: for tiles of 16 rows the next multiple of 32.
template <class U>
constexpr std::int64_t kTile = U::row_step == 16 ? 32 : 24;

struct Sizes {
    std::int64_t units, unit_stride, columns;  // of a row of q and k; unit_stride and columns are multiples of W
    std::int64_t scores, q, o, statistics, k, v, total;
};

template <class U>
PYXLBERT_INLINE Sizes sizes_of(const AttentionInputs& a) {
    Sizes s;
    s.units = round_to((a.head_size + U::pair - 1) / U::pair, U::k_step);
    s.unit_stride = round_to(s.units, W);
    s.columns = round_to(a.head_size, W);
    const std::int64_t keys = round_to(a.keys, W * 2);
    s.scores = kTile<U> * kScoreStride;
    s.q = kTile<U> * s.unit_stride;
    s.o = kTile<U> * s.columns;
    s.statistics = round_to(3 * kTile<U>, 16);
    s.k = keys * s.unit_stride;
    s.v = keys / U::pair * s.columns;
    s.total = round_to(s.scores + s.q + s.o + s.statistics + s.k + s.v, 1024) + 64;
    return s;
}

template <class T, class U>
struct Forward {
    const AttentionFwd& a;
    const Sizes& size;
    const Dropout dropout;
    const bool terms;
    float *scores, *q, *o, *maximum, *sum, *rescale, *k, *v;

    PYXLBERT_INLINE Forward(const AttentionFwd& arguments, const Sizes& sizes, float* scratch)
        : a(arguments),
          size(sizes),
          dropout(make_dropout(arguments.in.dropout_p, arguments.in.seed, Tag::attention)),
          terms(has_terms(arguments.in)) {
        scores = scratch;
        q = scores + size.scores;
        o = q + size.q;
        k = o + size.o;
        v = k + size.k;
        maximum = v + size.v;
        sum = maximum + kTile<U>;
        rescale = sum + kTile<U>;
    }

    PYXLBERT_INLINE void pack(const Plane<T>& p) {
        pack_transposed<T, U>(p.k, p.k_stride, p.keys, round_to(p.keys, W), a.in.head_size, k, size.unit_stride);
        pack_values<T, U>(p.v, p.v_stride, p.keys, round_to(p.keys, U::pair * U::k_step), a.in.head_size, v,
                          size.columns);
    }

    // Scores of one row, n of them visible, to weights; those up to `end` are zero.  Updates the row's
    // statistics and leaves in rescale[r] what its earlier output must be multiplied by.
    PYXLBERT_INLINE void softmax(const Plane<T>& p, std::int64_t r, std::int64_t i, std::int64_t j0, std::int64_t n,
                                 std::int64_t end) {
        float* s = scores + r * kScoreStride;
        if (terms) add_terms(a.in, p, s, i, j0, n);
        const std::int64_t padded = round_to(n, 2 * W);
        fill_from(s, n, padded, -kInfinity);
        Vec m0 = set1(-kInfinity), m1 = m0;
        for (std::int64_t j = 0; j < padded; j += 2 * W) {
            m0 = max(m0, load(s + j));
            m1 = max(m1, load(s + j + W));
        }
        const float before = maximum[r], block = reduce_max(max(m0, m1));
        const float now = block > before ? block : before;
        // With nothing seen yet every exponent is -inf, whatever is subtracted.
        const float base = now == -kInfinity ? 0.0f : now;
        const float factor = terms ? kLog2e : a.in.scale * kLog2e;
        constexpr int kDegree = U::pair == 2 ? 3 : 5;
        Vec l0 = zero(), l1 = zero();
        for (std::int64_t j = 0; j < padded; j += 2 * W) {
            const Vec w0 = exp2_nonpositive<kDegree>((load(s + j) - set1(base)) * set1(factor));
            const Vec w1 = exp2_nonpositive<kDegree>((load(s + j + W) - set1(base)) * set1(factor));
            l0 += w0;
            l1 += w1;
            if (U::pair == 2 && !dropout.active) {
#if defined(__AVX512BF16__)
                _mm512_storeu_si512(s + j / 2, round_pair(w0, w1));
#endif
            } else {
                store(s + j, w0);
                store(s + j + W, w1);
            }
        }
        rescale[r] = exp2_scalar((before - base) * factor);
        sum[r] = sum[r] * rescale[r] + reduce_add(l0 + l1);
        maximum[r] = now;
        if (dropout.active) drop_row(p, s, i, j0, padded);
        const std::int64_t from = padded / U::pair, to = round_to(end, W * U::pair) / U::pair;
        for (std::int64_t j = from; j < to; j += W) store(s + j, zero());
    }

    PYXLBERT_INLINE void drop_row(const Plane<T>& p, float* s, std::int64_t i, std::int64_t j0, std::int64_t padded) {
        for (std::int64_t j = 0; j < padded; j += 4 * W) {
            VecU words[4];
            dropout_words(dropout, static_cast<std::uint32_t>(j0 + j), static_cast<std::uint32_t>(i), p.plane, words);
#pragma GCC unroll 2
            for (int half = 0; half < 4; half += 2) {
                const std::int64_t at = j + half * W;
                if (at >= padded) break;
                const Vec w0 = drop(dropout, words[half], load(s + at));
                const Vec w1 = drop(dropout, words[half + 1], load(s + at + W));
                if constexpr (U::pair == 2) {
#if defined(__AVX512BF16__)
                    _mm512_storeu_si512(s + at / 2, round_pair(w0, w1));
#endif
                } else {
                    store(s + at, w0);
                    store(s + at + W, w1);
                }
            }
        }
    }

    void tile(const Plane<T>& p, std::int64_t h, std::int64_t q0, std::int64_t rows) {
        const std::int64_t d = a.in.head_size, padded = round_to(rows, U::row_step);
        pack_rows<T, U>(p.q + q0 * p.q_stride, p.q_stride, rows, d, q, size.unit_stride, size.unit_stride);
        for (std::int64_t u = rows * size.unit_stride; u < padded * size.unit_stride; u += W) store(q + u, zero());
        for (std::int64_t r = 0; r < rows; ++r) {
            maximum[r] = -kInfinity;
            sum[r] = 0.0f;
        }
        const std::int64_t limit = p.visible(q0 + rows - 1, a.in.causal, p.keys);
        for (std::int64_t j0 = 0; j0 < limit; j0 += kBlock) {
            const std::int64_t n = smaller(kBlock, limit - j0);
            multiply<U, false>({q, size.unit_stride}, {k + j0 * size.unit_stride, size.unit_stride * W, W}, size.units,
                               nullptr, 0, {scores, kScoreStride}, padded, (n + W - 1) / W);
            for (std::int64_t r = 0; r < rows; ++r) {
                const std::int64_t visible = p.visible(q0 + r, a.in.causal, limit) - j0;
                softmax(p, r, q0 + r, j0, visible < 0 ? 0 : smaller(visible, n), n);
            }
            if (j0 > 0)
                for (std::int64_t r = 0; r < rows; ++r) {
                    if (rescale[r] == 1.0f) continue;
                    float* row = o + r * size.columns;
                    for (std::int64_t c = 0; c < size.columns; c += W) store(row + c, load(row + c) * set1(rescale[r]));
                }
            multiply<U, false>({scores, kScoreStride}, {v + j0 / U::pair * size.columns, W, size.columns},
                               round_to((n + U::pair - 1) / U::pair, U::k_step), j0 > 0 ? o : nullptr, size.columns,
                               {o, size.columns}, padded, size.columns / W);
        }
        const std::int64_t stride = a.in.heads * d;
        T* out = static_cast<T*>(a.out) + (p.q_first + q0) * stride + h * d;
        for (std::int64_t r = 0; r < rows; ++r, out += stride) {
            const bool dead = sum[r] == 0.0f;
            a.lse[p.lse_first + q0 + r] =
                dead ? kInfinity : maximum[r] * (terms ? 1.0f : a.in.scale) + __builtin_logf(sum[r]);
            const Vec inverse = set1(dead ? 0.0f : 1.0f / sum[r]);
            const float* row = o + r * size.columns;
            std::int64_t c = 0;
            // A dead row may not have been written at all, so its output is not multiplied but replaced.
            for (; c + W <= d; c += W) store(out + c, dead ? zero() : load(row + c) * inverse);
            if (c < d) store(out + c, dead ? zero() : load(row + c) * inverse, static_cast<int>(d - c));
        }
    }
};

template <class T, class U>
void forward(const AttentionFwd& a) {
    const AttentionInputs& in = a.in;
    const Sizes size = sizes_of<U>(in);
    const std::int64_t planes = in.batch * in.heads, tiles = (in.queries + kTile<U> - 1) / kTile<U>;
    if (planes == 0 || tiles == 0) return;
    // Every task of a plane packs its keys again, so there are only as many as keep the threads busy.
    std::int64_t parts = planes >= 4 * in.threads ? 1 : smaller((4 * in.threads + planes - 1) / planes, tiles);
    const std::int64_t tiles_per_part = (tiles + parts - 1) / parts;
    parts = (tiles + tiles_per_part - 1) / tiles_per_part;
    const std::int64_t tasks = planes * parts;
    constexpr std::int64_t worth_a_thread = 1 << 17;  // multiplications
    const std::int64_t work = planes * in.queries * (in.keys + 1) * in.head_size;
    const int team = static_cast<int>(larger(1, smaller(smaller(in.threads, tasks), work / worth_a_thread)));
    float* scratch = static_cast<float*>(workspace(Slot::tile, team * size.total * sizeof(float)));

#pragma omp parallel num_threads(team)
    {
        Forward<T, U> worker(a, size, scratch + thread_index() * size.total);
        std::int64_t packed = -1;
        if constexpr (U::row_step == 16) begin_tiles();
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t plane = task / parts, h = plane % in.heads;
            const Plane<T> p = plane_of<T>(in, plane / in.heads, h);
            const std::int64_t first = task % parts * tiles_per_part * kTile<U>;
            const std::int64_t end = smaller(p.queries, first + tiles_per_part * kTile<U>);
            if (first >= end) continue;
            if (packed != plane) worker.pack(p);
            packed = plane;
            for (std::int64_t q0 = first; q0 < end; q0 += kTile<U>) worker.tile(p, h, q0, smaller(kTile<U>, end - q0));
        }
        if constexpr (U::row_step == 16) end_tiles();
    }
}

}  // namespace

void attention_fwd(const AttentionFwd& arguments) {
    with_element(arguments.in.dtype,
                 [&](auto element, auto unit) { forward<decltype(element), decltype(unit)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
