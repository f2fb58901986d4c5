// Attention, backward.  Scores are computed again from q, k and the saved lse:
//     P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta) with delta_i = dO_i . O_i,
//     dV = P^T dO, dK = scale * dS^T Q, dQ = scale * dS K, dbias = dS.
//
// A task owns a run of key blocks of one (sequence, head).  A block's keys, values and their gradients stay in
// the second-level cache while the tiles of queries pass by; dQ is accumulated in memory of Tq x D floats.
// The three sums over keys or queries take P and dS from where they are: a transposed A costs nothing
// (gemm_tile.h), bfloat16 rows are interleaved in pairs over their own scores, and tiles sum dK^T and dV^T.
//
// Determinism: dK and dV of a block belong to one task.  Runs of key blocks, and groups of planes that
// share a broadcast bias, are cut by size alone; each has its own partial sums, added in order at the end.
//
// Long sums: dK and dV of TILES_TOGETHER tiles are summed apart and then added to those of earlier tiles; dbias keeps
// what its additions round off where many rows meet in one element (sums.h).
#include "../workspace.h"
#include "attention_bwd_plan.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

template <class T>
PYXLBERT_INLINE void store_scores(T* target, const float* source, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + W <= n; j += W) store(target + j, load(source + j));
    if (j < n) store(target + j, load(source + j), static_cast<int>(n - j));
}

// Rows that will be read next: n of them, `stride` apart.
template <class T>
struct Upcoming {
    const T* rows;
    std::int64_t stride, n;
    std::int64_t each;  // to fetch in a step

    // Those of step `at`, into the second-level cache: rows of a projection lie too far apart for the processor to
    // fetch them by itself.
    PYXLBERT_INLINE void fetch(std::int64_t at, std::int64_t d) const {
        constexpr std::int64_t line = 64 / sizeof(T);
        for (std::int64_t i = at * each; i < smaller(n, (at + 1) * each); ++i)
            for (std::int64_t c = 0; c < d; c += line) __builtin_prefetch(rows + i * stride + c, 0, 2);
    }
};

// A key block of one plane and its pass over the queries.
template <class T>
struct Block {
    const Plane<T>& p;
    const T* dout;
    std::int64_t h, j0, n;  // n keys from j0 on
    std::int64_t first;     // the first tile of queries that meets it
    bool sums_delta;
    float *bias_partial, *bias_lost;
    bool begins_bias;                // nothing is in bias_partial yet
    Upcoming<T> k, v, q, dout_rows;  // of the block after this one
};

template <class T, class U>
struct Backward {
    const AttentionBwd& a;
    const Plan& plan;
    const Dropout dropout;
    const bool terms;
    float *delta, *minus_lse_correction, *top, *scores, *dp, *q, *dout, *q_values, *dout_values, *k, *v, *k_values, *dk,
        *dv, *all_dk, *all_dv, *undropped, *own_dquery;

    PYXLBERT_INLINE Backward(const AttentionBwd& arguments, const Plan& p, float* scratch)
        : a(arguments),
          plan(p),
          dropout(make_dropout(arguments.in.dropout_p, arguments.in.seed, Tag::attention)),
          terms(has_terms(arguments.in)) {
        const auto take = [&](std::int64_t floats) PYXLBERT_LAMBDA {
            float* taken = scratch;
            scratch += floats;
            return taken;
        };
        delta = take(p.delta);
        minus_lse_correction = take(p.delta);
        top = take(p.delta);
        scores = take(TILE<U> * SCORE_STRIDE);
        dp = take(TILE<U> * SCORE_STRIDE);
        q = take(TILE<U> * p.unit_stride);
        dout = take(TILE<U> * p.unit_stride);
        q_values = take(p.values);
        dout_values = take(p.values);
        k = take(BACKWARD_BLOCK * p.unit_stride);
        v = take(BACKWARD_BLOCK * p.unit_stride);
        k_values = take(BACKWARD_BLOCK * p.columns);
        dk = take(p.sums);
        dv = take(p.sums);
        all_dk = take(p.many_tiles ? p.sums : 0);
        all_dv = take(p.many_tiles ? p.sums : 0);
        undropped = take(SCORE_STRIDE);
        own_dquery = scratch;
    }

    PYXLBERT_INLINE const T* dout_of(const Plane<T>& p, std::int64_t b, std::int64_t h) const {
        const AttentionTensor& x = a.dout;
        return static_cast<const T*>(x.data) + (a.in.cu_seqlens != nullptr ? p.q_first * x.row : b * x.batch) +
               h * x.head;
    }

    // delta_i = dO_i . O_i
    PYXLBERT_INLINE void sum_rows(const Plane<T>& p, const T* dout_rows, std::int64_t h, std::int64_t q0,
                                  std::int64_t rows) {
        const std::int64_t d = a.in.head_size, stride = a.in.heads * d;
        const T* out = static_cast<const T*>(a.out) + p.q_first * stride + h * d;
        for (std::int64_t i = q0; i < q0 + rows; ++i) {
            delta[i] = dot_row(dout_rows + i * a.dout.row, out + i * stride, d);
        }
    }

    // Of the scores once their terms are added.
    PYXLBERT_INLINE float scale() const { return terms ? 1.0f : a.in.options.scale; }

    PYXLBERT_INLINE Exponent exponent_of(const Plane<T>& p, std::int64_t i) const {
        return {set1(scale()), set1(minus_exact_lse(a.lse[p.lse_first + i])), set1(minus_lse_correction[i])};
    }

    PYXLBERT_INLINE void pack_queries(const T* source, std::int64_t row_stride, std::int64_t rows, float* target) {
        const std::int64_t stride = plan.unit_stride;
        pack_rows<T, U>(source, row_stride, rows, a.in.head_size, target, stride, stride);
        for (std::int64_t u = rows * stride; u < round_to(rows, ROW_STEP<U>) * stride; u += W)
            store(target + u, zero());
    }

    PYXLBERT_INLINE void pack_keys(const Plane<T>& p, std::int64_t j0, std::int64_t n) {
        pack_transposed<T, U>(p.k + j0 * p.k_stride, p.k_stride, n, round_to(n, W), a.in.head_size, k,
                              plan.unit_stride);
    }

    // S of the packed queries and keys.
    PYXLBERT_INLINE void multiply_keys(const float* rows_a, const float* keys_b, float* target, std::int64_t padded,
                                       std::int64_t n) {
        multiply<U, false>({rows_a, plan.unit_stride}, {keys_b, plan.unit_stride * W, W}, plan.units, nullptr, 0,
                           {target, SCORE_STRIDE}, padded, ceil_divide(n, W));
    }

    // See inexact_lse.
    void normalise(const Plane<T>& p) {
        const float* lse = a.lse + p.lse_first;
        bool any = false;
        for (std::int64_t i = 0; i < p.queries; ++i) {
            minus_lse_correction[i] = 0.0f;
            Top{top[i], delta[i]}.begin(scale());
            any |= inexact_lse(lse[i]);
        }
        if (!any) return;
        for (std::int64_t j0 = 0; j0 < p.keys; j0 += BACKWARD_BLOCK) {
            const std::int64_t n = smaller(BACKWARD_BLOCK, p.keys - j0);
            pack_keys(p, j0, n);
            for (std::int64_t q0 = 0; q0 < p.queries; q0 += TILE<U>) {
                const std::int64_t rows = smaller(TILE<U>, p.queries - q0);
                pack_queries(p.q + q0 * p.q_stride, p.q_stride, rows, q);
                multiply_keys(q, k, scores, round_to(rows, ROW_STEP<U>), n);
                for (std::int64_t r = 0; r < rows; ++r) {
                    float* s = scores + r * SCORE_STRIDE;
                    const std::int64_t visible = larger(0, p.visible(q0 + r, a.in.options.causal, j0 + n) - j0);
                    if (terms) add_terms(a.in, p, s, q0 + r, j0, visible);
                    Top{top[q0 + r], delta[q0 + r]}.add(s, visible, scale());
                }
            }
        }
        for (std::int64_t i = 0; i < p.queries; ++i)
            if (inexact_lse(lse[i])) minus_lse_correction[i] = -__builtin_log2f(delta[i]);
    }

    // dS of query i into dbias, or into the partial sums of this task.
    PYXLBERT_INLINE void add_bias_gradient(const Block<T>& block, const float* g, std::int64_t i) {
        const std::int64_t j0 = block.j0, n = block.n;
        if (!plan.sums_bias) {
            const std::int64_t at = (block.p.plane * plan.bias_queries + i) * plan.bias_keys + j0;
            if (a.in.bias_dtype == DType::float32)
                store_scores(static_cast<float*>(a.dbias) + at, g, n);
            else if (a.in.bias_dtype == DType::bfloat16)
                store_scores(static_cast<bf16*>(a.dbias) + at, g, n);
            else
                store_scores(static_cast<f16*>(a.dbias) + at, g, n);
            return;
        }
        const std::int64_t first = (plan.bias_queries == 1 ? 0 : i) * plan.bias_keys;
        float* row = block.bias_partial + first;
        float* lost = block.bias_lost == nullptr ? nullptr : block.bias_lost + first;
        if (plan.bias_keys == 1) {
            Vec sum = zero();
            for (std::int64_t j = 0; j < n; j += W) sum += load(g + j);  // zero past n
            if (lost == nullptr)
                *row += reduce_add(sum);
            else
                add_exactly(*row, *lost, reduce_add(sum));
            return;
        }
        row += j0;
        if (block.begins_bias) return store_scores(row, g, n);
        for (std::int64_t j = 0; j < n; j += W) {
            const int left = static_cast<int>(smaller(W, n - j));
            Vec sum = load(row + j, left);
            if (lost == nullptr) {
                sum += load(g + j);
            } else {
                Vec rest = load(lost + j0 + j, left);
                add_exactly(sum, rest, load(g + j));
                store(lost + j0 + j, rest, left);
            }
            store(row + j, sum, left);
        }
    }

    void tile(const Block<T>& block, std::int64_t q0, std::int64_t rows, float* dquery, bool begins_sums) {
        const Plane<T>& p = block.p;
        const std::int64_t j0 = block.j0, n = block.n, d = a.in.head_size;
        const std::int64_t padded = round_to(rows, ROW_STEP<U>), end = round_to(n, 2 * W);
        const T *q_source = p.q + q0 * p.q_stride, *dout_source = block.dout + q0 * a.dout.row;
        if (block.sums_delta) sum_rows(p, block.dout, block.h, q0, rows);
        pack_queries(q_source, p.q_stride, rows, q);
        pack_queries(dout_source, a.dout.row, rows, dout);
        if constexpr (TILES<U>) {
            pack_columns<T, U>(q_source, p.q_stride, rows, padded, d, q_values, PAIR_STRIDE<U>, plan.columns);
            pack_columns<T, U>(dout_source, a.dout.row, rows, padded, d, dout_values, PAIR_STRIDE<U>, plan.columns);
        } else if constexpr (U::PAIR == 2) {
            pack_values<T, U>(q_source, p.q_stride, rows, padded, d, q_values, plan.columns);
            pack_values<T, U>(dout_source, a.dout.row, rows, padded, d, dout_values, plan.columns);
        }
        multiply_keys(q, k, scores, padded, n);
        multiply_keys(dout, v, dp, padded, n);
        const std::int64_t left = p.queries - q0 - TILE<U>;
        const Upcoming<T> next_q = upcoming(q_source + TILE<U> * p.q_stride, p.q_stride, left, rows, block.q);
        const Upcoming<T> next_dout =
            upcoming(dout_source + TILE<U> * a.dout.row, a.dout.row, left, rows, block.dout_rows);
        for (std::int64_t r = 0; r < padded; ++r) {
            float *s = scores + r * SCORE_STRIDE, *g = dp + r * SCORE_STRIDE;
            if (r < rows) {
                next_q.fetch(r, d);
                next_dout.fetch(r, d);
                const std::int64_t visible = larger(0, p.visible(q0 + r, a.in.options.causal, j0 + n) - j0);
                if (terms) add_terms(a.in, p, s, q0 + r, j0, visible);
                if (inexact_lse(a.lse[p.lse_first + q0 + r])) below_top(s, visible, top[q0 + r], scale());
                differentiate(exponent_of(p, q0 + r), dropout, p.plane, delta[q0 + r], s, g, undropped, q0 + r, j0,
                              visible, end, p.keys <= BACKWARD_BLOCK);
                block.k.fetch(q0 - block.first + r, d);
                block.v.fetch(q0 - block.first + r, d);
                if (a.dbias != nullptr) add_bias_gradient(block, g, q0 + r);
            } else {
                fill_from(s, 0, end, 0.0f);
                fill_from(g, 0, end, 0.0f);
            }
            if (U::PAIR == 2 && r % 2 != 0) interleave(s - SCORE_STRIDE, g - SCORE_STRIDE, SCORE_STRIDE, end);
        }
        sum_over_queries(padded / U::PAIR, n, begins_sums);
        float* dq = dquery + q0 * plan.columns;
        multiply<U, false>({dp, SCORE_STRIDE}, {k_values, W, plan.columns},
                           round_to(ceil_divide(n, U::PAIR), U::K_STEP), dq, plan.columns, {dq, plan.columns},
                           round_to(rows, U::ROW_STEP), plan.columns / W);
    }

    // dV and dK of the key block, from P, dS and the packed queries of a tile, added to those of earlier tiles; a step
    // is a query or a pair of queries.
    PYXLBERT_INLINE void sum_over_queries(std::int64_t steps, std::int64_t n, bool first) {
        const std::int64_t columns = plan.columns;
        if constexpr (TILES<U>) {
            const auto sum = [&](const float* rows_a, const float* scores_b, float* target) PYXLBERT_LAMBDA {
                multiply<U, false>({rows_a, PAIR_STRIDE<U>}, {scores_b, W, 2 * SCORE_STRIDE}, steps,
                                   first ? nullptr : target, SUM_STRIDE, {target, SUM_STRIDE}, columns,
                                   ceil_divide(n, W));
            };
            sum(dout_values, scores, dv);
            sum(q_values, scores + SCORE_STRIDE, dk);
        } else {
            const auto sum = [&](MatrixA scores_a, const float* rows_b, float* target) PYXLBERT_LAMBDA {
                multiply<U, true>(scores_a, {rows_b, W, columns}, steps, first ? nullptr : target, columns,
                                  {target, columns}, round_to(n, 2), columns / W);
            };
            if constexpr (U::PAIR == 2) {
                sum({scores, 2 * SCORE_STRIDE}, dout_values, dv);
                sum({scores + SCORE_STRIDE, 2 * SCORE_STRIDE}, q_values, dk);
            } else {
                sum({scores, SCORE_STRIDE}, dout, dv);
                sum({dp, SCORE_STRIDE}, q, dk);
            }
        }
    }

    // The block's dK and dV after `tiles` tiles of queries, where they are summed in two steps: what was summed last is
    // added to what was before, and at the end all of it is in dk and dv.
    PYXLBERT_INLINE void gather_sums(std::int64_t n, std::int64_t tiles, bool last) {
        const std::int64_t size = TILES<U> ? plan.columns * SUM_STRIDE : round_to(n, 2) * plan.columns;
        const auto gather = [&](float* sums, float* all) PYXLBERT_LAMBDA {
            if (tiles > TILES_TOGETHER)
                for (std::int64_t c = 0; c < size; c += W) store(all + c, load(all + c) + load(sums + c));
            else
                __builtin_memcpy(all, sums, size * sizeof(float));
            if (last) __builtin_memcpy(sums, all, size * sizeof(float));
        };
        gather(dk, all_dk);
        gather(dv, all_dv);
    }

    // The next tile of a plane with `left` rows after this one, or the one that follows the block.
    PYXLBERT_INLINE Upcoming<T> upcoming(const T* rows, std::int64_t stride, std::int64_t left, std::int64_t steps,
                                         const Upcoming<T>& follows) const {
        Upcoming<T> next = follows;
        if (left > 0) next = {rows, stride, smaller(left, TILE<U>), 0};
        next.each = ceil_divide(next.n, steps);
        return next;
    }

    // The keys from j0 on and the first queries of a plane: what is read after this block.
    PYXLBERT_INLINE void follow(Block<T>& block, const Plane<T>& p, const T* dout_rows, std::int64_t j0) const {
        const std::int64_t n = larger(0, smaller(BACKWARD_BLOCK, p.keys - j0)), first = smaller(TILE<U>, p.queries);
        const std::int64_t steps = block.p.queries - block.first;
        if (steps <= 0) return;
        block.k = {p.k + j0 * p.k_stride, p.k_stride, n, ceil_divide(n, steps)};
        block.v = {p.v + j0 * p.v_stride, p.v_stride, n, ceil_divide(n, steps)};
        block.q = {p.q, p.q_stride, first, 0};
        block.dout_rows = {dout_rows, a.dout.row, first, 0};
    }

    // Key blocks of run `part` of one plane; dquery receives the run's share.  `next` is the plane whose first block
    // comes after them, or -1.
    void run(std::int64_t plane, std::int64_t part, std::int64_t next, float* dquery, float* bias_partial,
             float* bias_lost, bool begins_bias) {
        const AttentionCall& in = a.in;
        const std::int64_t b = plane / in.heads, h = plane % in.heads, d = in.head_size;
        const Plane<T> p = plane_of<T>(in, b, h);
        const T* dout_rows = dout_of(p, b, h);
        __builtin_memset(dquery, 0, round_to(p.queries, U::ROW_STEP) * plan.columns * sizeof(float));
        normalise(p);
        const std::int64_t stride = in.heads * d;
        T* dkey = static_cast<T*>(a.dkey) + p.k_first * stride + h * d;
        T* dvalue = static_cast<T*>(a.dvalue) + p.k_first * stride + h * d;
        const std::int64_t begin = plan.blocks * part / plan.parts, finish = plan.blocks * (part + 1) / plan.parts;
        for (std::int64_t index = begin; index < finish; ++index) {
            const std::int64_t j0 = index * BACKWARD_BLOCK, all = smaller(BACKWARD_BLOCK, p.all_keys - j0);
            if (all <= 0) break;
            const std::int64_t n = larger(0, smaller(BACKWARD_BLOCK, p.keys - j0));
            if (n > 0) {
                pack_keys(p, j0, n);
                pack_transposed<T, U>(p.v + j0 * p.v_stride, p.v_stride, n, round_to(n, W), d, v, plan.unit_stride);
                pack_values<T, U>(p.k + j0 * p.k_stride, p.k_stride, n, round_to(n, U::PAIR * U::K_STEP), d, k_values,
                                  plan.columns);
                std::uint8_t hidden[BACKWARD_BLOCK];
                if (find_hidden<BACKWARD_BLOCK>(p, j0, n, hidden)) {
                    const auto unseen = [&](std::int64_t j) PYXLBERT_LAMBDA { return hidden[j] != 0; };
                    clear_values<U>(n, k_values, plan.columns, unseen);
                    clear_transposed(n, v, plan.unit_stride, unseen);
                }
                // Causal: query i meets this block from i = j0 - diagonal on.
                const std::int64_t first = in.options.causal ? larger(0, j0 - p.diagonal) / TILE<U> * TILE<U> : 0;
                // The first block of a run meets all queries that the others meet.
                Block<T> block = {
                    p,         dout_rows,   h,  j0, n,  first, p.keys > BACKWARD_BLOCK && index == begin, bias_partial,
                    bias_lost, begins_bias, {}, {}, {}, {}};
                if (index + 1 < finish && j0 + BACKWARD_BLOCK < p.keys) {
                    follow(block, p, dout_rows, j0 + BACKWARD_BLOCK);
                } else if (next >= 0) {
                    const Plane<T> other = plane_of<T>(in, next / in.heads, next % in.heads);
                    follow(block, other, dout_of(other, next / in.heads, next % in.heads), 0);
                }
                std::int64_t tiles = 0;
                for (std::int64_t q0 = first; q0 < p.queries; q0 += TILE<U>) {
                    tile(block, q0, smaller(TILE<U>, p.queries - q0), dquery, tiles % TILES_TOGETHER == 0);
                    const bool full = ++tiles % TILES_TOGETHER == 0, last = q0 + TILE<U> >= p.queries;
                    if ((full && !last) || (last && tiles > TILES_TOGETHER)) gather_sums(n, tiles, last);
                }
                if (first >= p.queries) {
                    __builtin_memset(dk, 0, plan.sums * sizeof(float));
                    __builtin_memset(dv, 0, plan.sums * sizeof(float));
                }
            }
            // The packed queries are used up.
            store_sums<T, U>(dkey + j0 * stride, stride, dk, plan.columns, n, d, in.options.scale, q);
            store_sums<T, U>(dvalue + j0 * stride, stride, dv, plan.columns, n, d, 1.0f, q);
            zero_rows(dkey + (j0 + n) * stride, stride, all - n, d);
            zero_rows(dvalue + (j0 + n) * stride, stride, all - n, d);
        }
    }
};

// Rows first .. end - 1 of one plane's dQ from `parts` partial sums, `between` floats apart.
template <class T>
PYXLBERT_INLINE void store_dquery(const AttentionBwd& a, const Plan& plan, std::int64_t plane, const float* dquery,
                                  std::int64_t parts, std::int64_t between) {
    const AttentionCall& in = a.in;
    const std::int64_t h = plane % in.heads, stride = in.heads * in.head_size;
    const Plane<T> p = plane_of<T>(in, plane / in.heads, h);
    T* target = static_cast<T*>(a.dquery) + p.q_first * stride + h * in.head_size;
    for (std::int64_t i = 0; i < p.queries; ++i) {
        float* row = const_cast<float*>(dquery) + i * plan.columns;
        for (std::int64_t part = 1; part < parts; ++part)
            for (std::int64_t c = 0; c < plan.columns; c += W)
                store(row + c, load(row + c) + load(row + part * between + c));
        store_row(target + i * stride, row, in.head_size, in.options.scale);
    }
}

template <class T, class U>
void backward(const AttentionBwd& a) {
    const AttentionCall& in = a.in;
    const Plan plan = make_plan<U>(a);
    const std::int64_t tasks = plan.slices * plan.groups * plan.parts;
    constexpr std::int64_t worth_a_thread = 1 << 17;  // multiplications
    const std::int64_t work = plan.planes * in.queries * (in.keys + 1) * in.head_size;
    const int team = static_cast<int>(larger(1, smaller(in.threads, work / worth_a_thread)));
    const std::int64_t shared_dquery = plan.parts > 1 ? plan.planes * plan.parts * plan.dquery : 0;
    const std::int64_t partial = plan.slices * plan.bias_slice, all_partials = plan.bias_partials * partial;
    const std::int64_t all_lost = plan.keeps_lost ? all_partials : 0;
    const std::int64_t shared_partials = all_lost + (plan.in_place ? 0 : all_partials);
    float* scratch = static_cast<float*>(workspace(Slot::tile, team * plan.task * sizeof(float)));
    float* shared = nullptr;
    if (shared_dquery + shared_partials > 0)
        shared = static_cast<float*>(workspace(Slot::shared, (shared_dquery + shared_partials + W) * sizeof(float)));
    float* lost = shared + shared_dquery;
    float* partials = plan.in_place ? static_cast<float*>(a.dbias) : lost + all_lost;
    const std::int64_t bias_bytes = element_size(in.bias_dtype);

#pragma omp parallel num_threads(team)
    {
        Backward<T, U> worker(a, plan, scratch + thread_index() * plan.task);
        if constexpr (TILES<U>) begin_tiles();
        const auto clear_all = [&](void* target, std::int64_t bytes) {
            constexpr std::int64_t chunk = 1 << 16;
#pragma omp for schedule(static)
            for (std::int64_t at = 0; at < bytes; at += chunk)
                __builtin_memset(static_cast<char*>(target) + at, 0, smaller(chunk, bytes - at));
        };
        // Keys that no query sees get no gradient, and nobody else writes there.
        if (a.dbias != nullptr && !plan.fills_bias)
            clear_all(plan.sums_bias ? partials : a.dbias, plan.sums_bias ? all_partials * 4 : partial * bias_bytes);
        if (all_lost > 0) clear_all(lost, all_lost * 4);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t part = task % plan.parts, group = task / plan.parts % plan.groups;
            const std::int64_t slice = task / plan.parts / plan.groups;
            float *bias_partial = nullptr, *bias_lost = nullptr;
            if (plan.sums_bias) {
                const std::int64_t set = plan.bias_keys == 1 ? group * plan.parts + part : group;
                bias_partial = partials + set * partial + slice * plan.bias_slice;
                if (plan.keeps_lost) bias_lost = lost + set * partial + slice * plan.bias_slice;
            }
            const std::int64_t first = plan.members * group / plan.groups;
            const std::int64_t finish = plan.members * (group + 1) / plan.groups;
            for (std::int64_t m = first; m < finish; ++m) {
                const std::int64_t plane = member_plane(a, slice, m);
                float* dquery =
                    plan.parts == 1 ? worker.own_dquery : shared + (plane * plan.parts + part) * plan.dquery;
                // This thread's next task is most likely as far away as there are threads.
                const std::int64_t later = task + team;
                std::int64_t next = -1;
                if (m + 1 < finish)
                    next = member_plane(a, slice, m + 1);
                else if (later < tasks)
                    next = member_plane(a, later / plan.parts / plan.groups,
                                        plan.members * (later / plan.parts % plan.groups) / plan.groups);
                const bool begins_bias = plan.fills_bias && m == first;
                worker.run(plane, part, next, dquery, bias_partial, bias_lost, begins_bias);
                if (plan.parts == 1) store_dquery<T>(a, plan, plane, dquery, 1, 0);
            }
        }
        finish_rows();
        if constexpr (TILES<U>) end_tiles();
        if (plan.parts > 1) {
#pragma omp for schedule(dynamic, 1)
            for (std::int64_t plane = 0; plane < plan.planes; ++plane)
                store_dquery<T>(a, plan, plane, shared + plane * plan.parts * plan.dquery, plan.parts, plan.dquery);
            finish_rows();
        }
        if (plan.sums_bias && !plan.in_place) {
            constexpr std::int64_t chunk = 1 << 12;
#pragma omp for schedule(static)
            for (std::int64_t at = 0; at < partial; at += chunk) {
                const std::int64_t n = smaller(chunk, partial - at);
                for (std::int64_t set = 1; set < plan.bias_partials; ++set) {
                    const float* other = partials + set * partial + at;
                    for (std::int64_t j = 0; j < n; ++j) partials[at + j] += other[j];
                }
                if (in.bias_dtype == DType::float32)
                    store_scores(static_cast<float*>(a.dbias) + at, partials + at, n);
                else if (in.bias_dtype == DType::bfloat16)
                    store_scores(static_cast<bf16*>(a.dbias) + at, partials + at, n);
                else
                    store_scores(static_cast<f16*>(a.dbias) + at, partials + at, n);
            }
        }
    }
}

}  // namespace

void attention_bwd(const AttentionBwd& arguments) {
#if defined(__AMX_BF16__)
    // Nothing else is multiplied by tiles.
    if (arguments.in.dtype == DType::bfloat16)
        backward<bf16, UnitOf<bf16>::Type>(arguments);
    else
        avx512::attention_bwd(arguments);
#else
    with_element(arguments.in.dtype,
                 [&](auto element, auto unit) { backward<decltype(element), decltype(unit)>(arguments); });
#endif
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
