// Relative attention, backward, one stream or two.  Scores are computed again from their parts and the saved lse; with
//     P = exp(S - lse), dP = dO V^T, G = scale * P * (dP - delta), delta_i = dO_i . O_i, and G_r, which is G with every
//     row moved to the columns of the table rows that it meets:
//     dV = P^T dO, dK = G^T (q + u), dr = G_r^T (q + w), dq = G K + G_r r + segments.
//
// A task owns a run of key blocks of all sequences that share one head of a table (or of a group of them).  A block's
// keys, values and their gradients stay in the second-level cache while the tiles of queries pass by.  For every tile:
// the band of table rows that it meets is packed twice, as columns for the scores and as rows for dq; G_r is G copied
// row by row into a band of zeros; dr is summed in the task's own memory of a run's keys and the queries' rows.
//
// Where bfloat16 is multiplied in pairs, the sums over queries take P, G and G_r in pairs of rows, and the sums over
// keys take G and G_r rounded row by row: a row of G_r is then a row of G moved by a number of bfloat16.  Tiles sum dK,
// dV and dr transposed (backward_rows.h).
//
// Determinism: runs of key blocks and groups of sequences are cut by size alone; each has its own partial sums, added
// in order at the end.
//
// Long sums: dK, dV and dr of TILES_TOGETHER tiles are summed apart and then added to those of earlier ones, dr with
// what those additions round off (sums.h); so are the sums over all rows of a plane.
#include "../workspace.h"
#include "relative_plan.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

PYXLBERT_INLINE void add_row(float* sum, const float* row, std::int64_t columns, float factor = 1.0f) {
    for (std::int64_t c = 0; c < columns; c += W) store(sum + c, fma(load(row + c), set1(factor), load(sum + c)));
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

template <class T, class U>
struct Backward {
    // Rows of G_r take half the room in pairs, and leave the rest to pairs of rows.
    static constexpr std::int64_t DBAND_STRIDE = BAND_STRIDE / U::PAIR;

    const RelativeAttentionBwd& a;
    const RelativeInputs& relative;
    const AttentionInputs& in;
    const Plan& plan;
    const bool terms;
    Dropout dropout;
    float *scores, *dp, *band, *dband, *band_pairs, *q_content, *q_position, *dout, *content_values, *position_values,
        *dout_values, *dq_tile, *k, *v, *k_values, *dk, *dv, *all_dk, *all_dv, *undropped, *table, *table_values,
        *delta, *log2_norm, *same_sum, *other_sum, *same_score, *other_score, *one_row, *small_run, *small_lost,
        *own_dtable, *dtable_lost, *own_dquery;
    std::int32_t *index, *place;  // of every row of the plane, the streams one after the other

    // The plane.
    Plane<T> p;
    std::int64_t b, h;
    Queries<T> queries[STREAMS];
    const T* dout_rows[STREAMS];
    std::int64_t start[STREAMS + 1];
    float *dquery, *small, *dtable;
    std::int64_t first_row;                 // of the table, in dtable
    std::int64_t block_tiles, table_tiles;  // summed in dk and dv, and in own_dtable, since they were gathered last
    std::int64_t pass_tiles;                // of the key block
    bool gathered;                          // all_dk and all_dv hold something
    std::int64_t lowest_row, highest_row;   // of own_dtable that those tiles have touched

    PYXLBERT_INLINE Backward(const RelativeAttentionBwd& arguments, const Plan& with, float* scratch)
        : a(arguments),
          relative(arguments.in),
          in(arguments.in.in),
          plan(with),
          terms(has_terms(arguments.in.in) || has_relative_terms(&arguments.in)),
          dropout(make_dropout(arguments.in.in.dropout_p, arguments.in.in.seed, Tag::relative_attention)) {
        const auto take = [&](std::int64_t floats) PYXLBERT_LAMBDA {
            float* taken = scratch;
            scratch += floats;
            return taken;
        };
        const std::int64_t rows = round_to(plan.rows, 16), columns = plan.columns;
        scores = take(TILE<U> * SCORE_STRIDE);
        dp = take(TILE<U> * SCORE_STRIDE);
        band = take(TILE<U> * BAND_STRIDE);
        // In pairs: the rows themselves, and pairs of rows.
        dband = take(TILE<U> * BAND_STRIDE);
        band_pairs = dband + TILE<U> * DBAND_STRIDE;
        q_content = take(TILE<U> * plan.unit_stride);
        q_position = take(TILE<U> * plan.unit_stride);
        dout = take(TILE<U> * plan.unit_stride);
        content_values = take(plan.values);
        position_values = take(plan.values);
        dout_values = take(plan.values);
        dq_tile = take(TILE<U> * columns);
        k = take(BACKWARD_BLOCK * plan.unit_stride);
        v = take(BACKWARD_BLOCK * plan.unit_stride);
        k_values = take(BACKWARD_BLOCK * columns);
        dk = take(plan.sums);
        dv = take(plan.sums);
        all_dk = take(plan.many_tiles ? plan.sums : 0);
        all_dv = take(plan.many_tiles ? plan.sums : 0);
        undropped = take(SCORE_STRIDE);
        table = take(round_to(BACKWARD_BLOCK + SPAN, W) * plan.unit_stride);
        table_values = take(round_to(BACKWARD_BLOCK + SPAN, W) * columns);
        delta = take(rows);
        log2_norm = take(rows);
        same_sum = take(rows);
        other_sum = take(rows);
        index = reinterpret_cast<std::int32_t*>(take(rows));
        place = reinterpret_cast<std::int32_t*>(take(rows));
        same_score = take(TILE<U>);
        other_score = take(TILE<U>);
        one_row = take(3 * columns);
        small_run = take(SMALL * columns);
        small_lost = take(SMALL * columns);
        own_dtable = take(plan.dtable);
        dtable_lost = take(plan.gathers_table ? plan.table_rows * columns : 0);
        own_dquery = scratch;
    }

    PYXLBERT_INLINE const T* query_row(int stream, std::int64_t row) const {
        return queries[stream].data + index[row] * queries[stream].stride;
    }
    PYXLBERT_INLINE const T* dout_row(int stream, std::int64_t row) const {
        return dout_rows[stream] + index[row] * a.dout[stream].row;
    }
    PYXLBERT_INLINE float lse_of(int stream, std::int64_t row) const {
        return a.rows[stream].lse[queries[stream].lse_first + index[row]];
    }

    void begin_plane(std::int64_t plane) {
        b = plane / in.heads;
        h = plane % in.heads;
        p = plane_of<T>(in, b, h);
        if (relative.options.uniform_rows) p.keys = p.all_keys;
        start[0] = 0;
        for (int stream = 0; stream < STREAMS; ++stream) {
            const Queries<T>& x = queries[stream] = queries_of<T>(in, a.rows[stream], b, h);
            const AttentionTensor& d = a.dout[stream];
            dout_rows[stream] =
                static_cast<const T*>(d.data) + (in.cu_seqlens != nullptr ? x.first * d.row : b * d.batch) + h * d.head;
            std::int64_t row = start[stream];
            for (std::int64_t at = first_at(x, 0); at < x.count; ++at, ++row) {
                index[row] = x.order != nullptr ? x.order[at] : static_cast<std::int32_t>(at);
                place[row] = x.positions != nullptr ? x.positions[index[row]] : index[row];
                same_sum[row] = other_sum[row] = log2_norm[row] = 0.0f;
            }
            start[stream + 1] = row;
        }
    }

    PYXLBERT_INLINE void clear_row(float* row, std::int64_t n) const {
        for (std::int64_t c = 0; c < n; c += W) store(row + c, zero());
    }

    // Rows row .. row + rows - 1 of a stream against n keys from j0 on: q_content, q_position, the band of the table
    // and S with all its terms.
    PYXLBERT_INLINE void score(int stream, std::int64_t row, std::int64_t rows, std::int64_t j0, std::int64_t n) {
        const std::int64_t d = in.head_size, columns = plan.columns, stride = plan.unit_stride;
        const std::int64_t padded = round_to(rows, ROW_STEP<U>);
        for (std::int64_t r = 0; r < rows; ++r) {
            const T* x = query_row(stream, row + r);
            pack_query<T, U>(x, of_head(relative.content_bias, h, d), d, q_content + r * stride, stride);
            pack_query<T, U>(x, of_head(relative.position_bias, h, d), d, q_position + r * stride, stride);
            if (relative.segment_embedding != nullptr) {
                const float* bias = of_head(relative.segment_bias, h, d);
                const float* same = of_head(relative.segment_embedding, h, d);
                same_score[r] = segment_score(x, bias, same, d);
                other_score[r] = segment_score(x, bias, same + in.heads * d, d);
            }
        }
        for (std::int64_t r = rows; r < padded; ++r) {
            clear_row(q_content + r * stride, stride);
            clear_row(q_position + r * stride, stride);
        }
        const std::int64_t last = place[row + rows - 1], span = last - place[row], width = n + span;
        const std::int64_t first = relative.offset + j0 - last;
        const std::int64_t present = larger(0, smaller(width, relative.table_rows - first));
        const AttentionTensor& r = relative.table;
        const T* source =
            static_cast<const T*>(r.data) + b * relative.tables / in.batch * r.batch + h * r.head + first * r.row;
        pack_transposed<T, U>(source, r.row, present, round_to(width, W), d, table, stride);
        pack_values<T, U>(source, r.row, present, round_to(width, U::PAIR * U::K_STEP), d, table_values, columns);
        multiply<U, false>({q_position, stride}, {table, stride * W, W}, plan.units, nullptr, 0, {band, BAND_STRIDE},
                           padded, ceil_divide(width, W));
        const float* init = band + rows - 1;
        std::int64_t init_stride = BAND_STRIDE - 1;
        if (queries[stream].positions != nullptr) {
            for (std::int64_t x = 0; x < rows; ++x)
                __builtin_memcpy(scores + x * SCORE_STRIDE, band + x * BAND_STRIDE + last - place[row + x], n * 4);
            init = scores;
            init_stride = SCORE_STRIDE;
        }
        multiply<U, false>({q_content, stride}, {k, stride * W, W}, plan.units, init, init_stride,
                           {scores, SCORE_STRIDE}, padded, ceil_divide(n, W));
        if (!terms) return;
        const QueryRows& info = a.rows[stream];
        for (std::int64_t x = 0; x < rows; ++x) {
            const std::int64_t i = index[row + x], visible = visible_keys(i, j0, n);
            float* s = scores + x * SCORE_STRIDE;
            add_relative_terms(relative, p, s, {same_score[x], other_score[x]}, queries[stream].rank,
                               queries[stream].segment, info.options.see_self, i,
                               info.options.mask_by_position ? place[row + x] : i, j0, visible);
            if (relative.options.uniform_rows) fill_from(s, visible, round_to(n, W), UNIFORM_SCORE);
        }
    }

    // Of n keys from j0 on those that lengths and causal leave to query i.
    PYXLBERT_INLINE std::int64_t visible_keys(std::int64_t i, std::int64_t j0, std::int64_t n) const {
        return larger(0, smaller(n, p.visible(i, in.options.causal, p.seen_keys) - j0));
    }

    PYXLBERT_INLINE Exponent exponent_of(int stream, std::int64_t row) const {
        return {set1(terms ? 1.0f : in.options.scale), set1(-lse_of(stream, row)), set1(log2_norm[row])};
    }

    PYXLBERT_INLINE void pack_keys(std::int64_t j0, std::int64_t n) {
        pack_transposed<T, U>(p.k + j0 * p.k_stride, p.k_stride, n, round_to(n, W), in.head_size, k, plan.unit_stride);
    }

    // Calls work(stream, row, rows, n) for every tile of queries that may see some of the n keys from j0 on.
    template <class F>
    PYXLBERT_INLINE void for_tiles(std::int64_t j0, std::int64_t n, F work) {
        const std::int32_t* ranks = relative.key_rank == nullptr ? nullptr : relative.key_rank + p.k_first + j0;
        const std::int32_t lowest = ranks == nullptr ? 0 : lowest_of(ranks, n);
        for (int stream = 0; stream < STREAMS; ++stream) {
            dropout.tag = a.rows[stream].options.tag;
            std::int64_t rows;
            for (std::int64_t row = start[stream]; row < start[stream + 1]; row += rows) {
                rows = 1;
                while (rows < TILE<U> && row + rows < start[stream + 1] && place[row + rows] - place[row] <= SPAN)
                    ++rows;
                std::int64_t seen = n;
                if (!relative.options.uniform_rows) {
                    if (ranks != nullptr && hidden(stream, row, rows, j0, n, lowest)) continue;
                    seen = visible_keys(index[row + rows - 1], j0, n);
                }
                if (seen > 0) work(stream, row, rows, seen);
            }
        }
    }

    PYXLBERT_INLINE bool hidden(int stream, std::int64_t row, std::int64_t rows, std::int64_t j0, std::int64_t n,
                                std::int32_t lowest) const {
        if (a.rows[stream].options.see_self && index[row] + p.diagonal < j0 + n &&
            index[row + rows - 1] + p.diagonal >= j0)
            return false;
        for (std::int64_t r = row; r < row + rows; ++r)
            if (queries[stream].rank[index[r]] > lowest) return false;
        return true;
    }

    // See inexact_lse.
    void normalise() {
        bool any = false;
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                delta[row] = 0.0f;
                any |= inexact_lse(lse_of(stream, row));
            }
        if (!any) return;
        for (std::int64_t j0 = 0; j0 < p.keys; j0 += BACKWARD_BLOCK) {
            const std::int64_t n = smaller(BACKWARD_BLOCK, p.keys - j0);
            pack_keys(j0, n);
            for_tiles(j0, n, [&](int stream, std::int64_t row, std::int64_t rows, std::int64_t seen) {
                score(stream, row, rows, j0, seen);
                for (std::int64_t r = 0; r < rows; ++r) {
                    const std::int64_t own =
                        relative.options.uniform_rows ? seen : visible_keys(index[row + r], j0, seen);
                    const Exponent exponent = exponent_of(stream, row + r);
                    Vec sum = zero();
                    for (std::int64_t j = 0; j < own; j += W) sum += exponent.weight(scores + r * SCORE_STRIDE, j, own);
                    delta[row + r] += reduce_add(sum);
                }
            });
        }
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row)
                if (inexact_lse(lse_of(stream, row))) log2_norm[row] = -__builtin_log2f(delta[row]);
    }

    void tile(int stream, std::int64_t row, std::int64_t rows, std::int64_t j0, std::int64_t n) {
        const std::int64_t d = in.head_size, columns = plan.columns, wide = columns / W, end = round_to(n, 2 * W);
        const std::int64_t padded = round_to(rows, ROW_STEP<U>), stride = plan.unit_stride;
        score(stream, row, rows, j0, n);
        for (std::int64_t r = 0; r < rows; ++r)
            pack_rows<T, U>(dout_row(stream, row + r), 0, 1, d, dout + r * stride, 0, stride);
        for (std::int64_t r = rows; r < padded; ++r) clear_row(dout + r * stride, stride);
        multiply<U, false>({dout, stride}, {v, stride * W, W}, plan.units, nullptr, 0, {dp, SCORE_STRIDE}, padded,
                           ceil_divide(n, W));
        const std::int64_t last = place[row + rows - 1], width = n + last - place[row];
        for (std::int64_t r = 0; r < padded; ++r) {
            float *s = scores + r * SCORE_STRIDE, *g = dp + r * SCORE_STRIDE;
            if (r < rows) {
                differentiate_row(stream, row + r, s, g, j0, n, end);
            } else if (U::PAIR == 2) {
                clear_row(s, end);
                clear_row(g, end);
            }
            if constexpr (U::PAIR == 2) {
                if (r % 2 == 0) continue;
                interleave(s - SCORE_STRIDE, g - SCORE_STRIDE, SCORE_STRIDE, end);
                for (std::int64_t x = r - 1; x <= r; ++x)
                    move_row(dband + x * DBAND_STRIDE, dp + x * SCORE_STRIDE, x < rows ? last - place[row + x] : 0, n,
                             round_to(width, 2 * W));
                pair_rows(dband + (r - 1) * DBAND_STRIDE, dband + r * DBAND_STRIDE, width,
                          band_pairs + r / 2 * BAND_STRIDE);
            } else if (r < rows) {
                move_row(dband + r * DBAND_STRIDE, g, last - place[row + r], n, round_to(width, 2));
            }
        }
        sum_over_queries(rows, padded, n, width, relative.offset + j0 - last - first_row);
        gather_full(n, width, relative.offset + j0 - last - first_row);
        const auto steps = [](std::int64_t keys)
                               PYXLBERT_LAMBDA { return round_to(ceil_divide(keys, U::PAIR), U::K_STEP); };
        multiply<U, false>({dp, SCORE_STRIDE}, {k_values, W, columns}, steps(n), nullptr, 0, {dq_tile, columns}, padded,
                           wide);
        add_tile(row, rows, content);
        multiply<U, false>({dband, DBAND_STRIDE}, {table_values, W, columns}, steps(width), nullptr, 0,
                           {dq_tile, columns}, padded, wide);
        add_tile(row, rows, position);
    }

    // Scores and dP of a row to P and G, and the sums of G over either kind of segment.
    PYXLBERT_INLINE void differentiate_row(int stream, std::int64_t row, float* s, float* g, std::int64_t j0,
                                           std::int64_t n, std::int64_t end) {
        const std::int64_t i = index[row], visible = visible_keys(i, j0, n);
        differentiate(exponent_of(stream, row), dropout, p.plane, delta[row], s, g, undropped, i, j0,
                      relative.options.uniform_rows ? n : visible, end, p.keys <= BACKWARD_BLOCK);
        // Later keys may lie outside the table, so their scores are constants.
        if (relative.options.uniform_rows && in.options.causal)
            fill_from(g, larger(0, smaller(n, i + p.diagonal + 1 - j0)), end, 0.0f);
        if (relative.segment_embedding == nullptr) return;
        const float same = sum_of_segment(g, relative.key_segments + p.k_first + j0, queries[stream].segment[i], n);
        Vec all = zero();
        for (std::int64_t j = 0; j < end; j += W) all += load(g + j);
        same_sum[row] += same;
        other_sum[row] += reduce_add(all) - same;
    }

    // n elements of a row of G, moved by `shift`, zeros around them up to element `end`.  An element is a float, or a
    // bfloat16 where those are multiplied in pairs.
    PYXLBERT_INLINE void move_row(float* target, const float* g, std::int64_t shift, std::int64_t n,
                                  std::int64_t end) const {
        constexpr std::int64_t size = 4 / U::PAIR;
        char* to = reinterpret_cast<char*>(target);
        __builtin_memset(to, 0, shift * size);
        __builtin_memcpy(to + shift * size, g, n * size);
        __builtin_memset(to + (shift + n) * size, 0, (end - shift - n) * size);
    }

    // dV, dK and dr of a tile, added to those of earlier ones, dr from its row `first` on; a step is a query or a pair
    // of them.
    PYXLBERT_INLINE void sum_over_queries([[maybe_unused]] std::int64_t rows, std::int64_t padded, std::int64_t n,
                                          std::int64_t width, std::int64_t first) {
        const std::int64_t columns = plan.columns, stride = plan.unit_stride;
        if constexpr (TILES<U>) {
            const auto sum = [&](const float* rows_a, float* values, MatrixB scores_b, MatrixC target,
                                 std::int64_t count) PYXLBERT_LAMBDA {
                pack_columns<T, U>(reinterpret_cast<const T*>(rows_a), 2 * stride, rows, padded, in.head_size, values,
                                   PAIR_STRIDE<U>, columns);
                multiply<U, false>({values, PAIR_STRIDE<U>}, scores_b, padded / 2, target.data, target.stride, target,
                                   columns, ceil_divide(count, W));
            };
            sum(dout, dout_values, {scores, W, 2 * SCORE_STRIDE}, {dv, SUM_STRIDE}, n);
            sum(q_content, content_values, {scores + SCORE_STRIDE, W, 2 * SCORE_STRIDE}, {dk, SUM_STRIDE}, n);
            if (dtable != nullptr)
                sum(q_position, position_values, {band_pairs, W, BAND_STRIDE}, {own_dtable + first, plan.table_stride},
                    width);
        } else {
            const std::int64_t all_keys = round_to(n, 2), all_rows = round_to(width, 2);
            float* dr = dtable == nullptr ? nullptr : (plan.gathers_table ? own_dtable : dtable) + first * columns;
            const auto sum = [&](MatrixA scores_a, const float* rows_b, std::int64_t steps, float* target,
                                 std::int64_t count) PYXLBERT_LAMBDA {
                multiply<U, true>(scores_a, {rows_b, W, columns}, steps, target, columns, {target, columns}, count,
                                  columns / W);
            };
            if constexpr (U::PAIR == 2) {
                const std::int64_t steps = padded / 2;
                const auto pair = [&](const float* rows_a, float* values) PYXLBERT_LAMBDA {
                    for (std::int64_t x = 0; x < steps; ++x)
                        pair_rows(rows_a + 2 * x * stride, rows_a + (2 * x + 1) * stride, columns,
                                  values + x * columns);
                };
                pair(dout, dout_values);
                pair(q_content, content_values);
                pair(q_position, position_values);
                sum({scores, 2 * SCORE_STRIDE}, dout_values, steps, dv, all_keys);
                sum({scores + SCORE_STRIDE, 2 * SCORE_STRIDE}, content_values, steps, dk, all_keys);
                if (dr != nullptr) sum({band_pairs, BAND_STRIDE}, position_values, steps, dr, all_rows);
            } else {
                sum({scores, SCORE_STRIDE}, dout, rows, dv, all_keys);
                sum({dp, SCORE_STRIDE}, q_content, rows, dk, all_keys);
                if (dr != nullptr) sum({dband, DBAND_STRIDE}, q_position, rows, dr, all_rows);
            }
        }
    }

    // Counts a tile, and takes dk and dv of many away.
    PYXLBERT_INLINE void gather_full(std::int64_t n, std::int64_t width, std::int64_t first) {
        if (plan.many_tiles && ++block_tiles == TILES_TOGETHER) gather_sums(n);
        if (!plan.gathers_table) return;
        lowest_row = smaller(lowest_row, first);
        highest_row = larger(highest_row, first + round_to(width, 2));
        ++pass_tiles;
    }

    PYXLBERT_INLINE void end_pass() {
        table_tiles += smaller(pass_tiles, MOST_IN_PASS);
        if (plan.gathers_table && table_tiles >= TABLE_TOGETHER) gather_table();
    }

    // dk and dv of n keys at most, to those of earlier tiles of the block.
    PYXLBERT_INLINE void gather_sums(std::int64_t n) {
        const std::int64_t size = TILES<U> ? plan.columns * SUM_STRIDE : round_to(n, 2) * plan.columns;
        const auto gather = [&](float* sums, float* all) PYXLBERT_LAMBDA {
            for (std::int64_t c = 0; c < size; c += W) store(all + c, load(all + c) + load(sums + c));
            clear(sums, size);
        };
        if (!gathered) {
            const std::int64_t whole = sums_of_block();
            clear(all_dk, whole);
            clear(all_dv, whole);
        }
        gather(dk, all_dk);
        gather(dv, all_dv);
        gathered = true;
        block_tiles = 0;
    }

    // The touched rows of own_dtable to dtable.
    void gather_table() {
        const std::int64_t columns = plan.columns;
        const auto add = [&](std::int64_t row, const float* sums) PYXLBERT_LAMBDA {
            add_exactly(dtable + row * columns, dtable_lost + row * columns, sums, columns);
        };
        if constexpr (TILES<U>) {
            const std::int64_t first = lowest_row / W * W, end = smaller(round_to(highest_row, W), plan.table_rows);
            for (std::int64_t row = first; row < end; row += W) {
                rows_of_sums(own_dtable + row, plan.table_stride, columns, q_content);
                for (std::int64_t i = 0; i < smaller(W, end - row); ++i) add(row + i, q_content + i * columns);
            }
            for (std::int64_t c = 0; c < columns; ++c) clear(own_dtable + c * plan.table_stride + first, end - first);
        } else {
            for (std::int64_t row = lowest_row; row < highest_row; ++row) add(row, own_dtable + row * columns);
            clear(own_dtable + lowest_row * columns, (highest_row - lowest_row) * columns);
        }
        forget_rows();
    }

    PYXLBERT_INLINE void forget_rows() {
        table_tiles = highest_row = 0;
        lowest_row = plan.table_rows;
    }

    // A partial dr is complete.
    void store_table_sums() {
        if (dtable == nullptr) return;
        if (plan.gathers_table) return gather_table();
        if (!TILES<U>) return;
        for (std::int64_t row = 0; row < plan.table_rows; row += W) {
            rows_of_sums(own_dtable + row, plan.table_stride, plan.columns, q_content);
            __builtin_memcpy(dtable + row * plan.columns, q_content,
                             smaller(W, plan.table_rows - row) * plan.columns * sizeof(float));
        }
    }

    // Where a partial dr is summed, empty.
    void clear_table_sums() {
        if (dtable == nullptr) return;
        const std::int64_t size = plan.table_rows * plan.columns;
        clear(own_dtable, plan.dtable);
        if (!TILES<U> || plan.gathers_table) clear(dtable, size);
        if (plan.gathers_table) clear(dtable_lost, size);
        forget_rows();
    }

    // dq_tile to dQ, and the sum of its rows to one of `small`.
    PYXLBERT_INLINE void add_tile(std::int64_t row, std::int64_t rows, Small which) {
        const std::int64_t columns = plan.columns;
        constexpr int TOGETHER = 4;
        for (std::int64_t first = 0; first < columns; first += TOGETHER * W) {
            const int vectors = static_cast<int>(smaller(TOGETHER, (columns - first) / W));
            Vec sum[TOGETHER] = {zero(), zero(), zero(), zero()};
            for (std::int64_t r = 0; r < rows; ++r) {
                float* dq = dquery + (row + r) * columns + first;
                const float* x = dq_tile + r * columns + first;
                for (int v = 0; v < vectors; ++v) {
                    const Vec more = load(x + v * W);
                    store(dq + v * W, load(dq + v * W) + more);
                    sum[v] += more;
                }
            }
            for (int v = 0; v < vectors; ++v) add_to_small(which, first + v * W, sum[v]);
        }
    }

    PYXLBERT_INLINE void add_to_small(int which, std::int64_t c, Vec x) {
        float *total = small + which * plan.columns + c, *lost = small_lost + which * plan.columns + c;
        Vec sum = load(total), rest = load(lost);
        add_exactly(sum, rest, x);
        store(total, sum);
        store(lost, rest);
    }

    PYXLBERT_INLINE std::int64_t sums_of_block() const {
        return TILES<U> ? plan.columns * SUM_STRIDE : BACKWARD_BLOCK * plan.columns;
    }

    // What the segment term gives to dQ, to its bias and to both embeddings.
    void add_segments() {
        const std::int64_t d = in.head_size, columns = plan.columns;
        const float* same = of_head(relative.segment_embedding, h, d);
        pack_rows<float, FloatUnit>(same, 0, 1, d, one_row, 0, columns);
        pack_rows<float, FloatUnit>(same + in.heads * d, 0, 1, d, one_row + columns, 0, columns);
        float* biased = one_row + 2 * columns;
        clear(small_run, SMALL * columns);
        std::int64_t added = 0;
        const auto gather = [&] {
            for (int which = segment; which < SMALL; ++which)
                for (std::int64_t c = 0; c < columns; c += W)
                    add_to_small(which, c, load(small_run + which * columns + c));
            clear(small_run, SMALL * columns);
        };
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                pack_query<T, FloatUnit>(query_row(stream, row), of_head(relative.segment_bias, h, d), d, biased,
                                         columns);
                float* dq = dquery + row * columns;
                const auto add = [&](Small embedding, const float* e, float sum) PYXLBERT_LAMBDA {
                    add_row(dq, e, columns, sum);
                    add_row(small_run + segment * columns, e, columns, sum);
                    add_row(small_run + embedding * columns, biased, columns, sum);
                };
                add(same_segment, one_row, same_sum[row]);
                add(other_segment, one_row + columns, other_sum[row]);
                if (++added % RUN_LENGTH == 0) gather();
            }
        gather();
    }

    // Key blocks of run `part` of one plane.
    void run(std::int64_t plane, std::int64_t part) {
        begin_plane(plane);
        const std::int64_t d = in.head_size, columns = plan.columns, stride = in.heads * d;
        __builtin_memset(dquery, 0, start[STREAMS] * columns * sizeof(float));
        clear(small, SMALL * columns);
        clear(small_lost, SMALL * columns);
        normalise();
        if (p.keys > BACKWARD_BLOCK)
            for (int stream = 0; stream < STREAMS; ++stream)
                for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                    const T* out = static_cast<const T*>(a.rows[stream].out) +
                                   (queries[stream].first + index[row]) * stride + h * d;
                    delta[row] = dot_row(dout_row(stream, row), out, d);
                }
        T* dkey = static_cast<T*>(a.dkey) + p.k_first * stride + h * d;
        T* dvalue = static_cast<T*>(a.dvalue) + p.k_first * stride + h * d;
        for (std::int64_t block = first_block(plan, part); block < first_block(plan, part + 1); ++block) {
            const std::int64_t j0 = block * BACKWARD_BLOCK, all = smaller(BACKWARD_BLOCK, p.all_keys - j0);
            if (all <= 0) break;
            const std::int64_t n = larger(0, smaller(BACKWARD_BLOCK, p.keys - j0));
            if (n > 0) {
                pack_keys(j0, n);
                pack_transposed<T, U>(p.v + j0 * p.v_stride, p.v_stride, n, round_to(n, W), d, v, plan.unit_stride);
                pack_values<T, U>(p.k + j0 * p.k_stride, p.k_stride, n, round_to(n, U::PAIR * U::K_STEP), d, k_values,
                                  columns);
                if (relative.key_rank != nullptr && !relative.options.uniform_rows) clear_block(j0, n);
                const std::int64_t sums = TILES<U> ? columns * SUM_STRIDE : round_to(n, 2) * columns;
                clear(dk, sums);
                clear(dv, sums);
                block_tiles = pass_tiles = 0;
                gathered = false;
                for_tiles(j0, n, [&](int stream, std::int64_t row, std::int64_t rows, std::int64_t seen) {
                    tile(stream, row, rows, j0, seen);
                });
                if (gathered) gather_sums(n);
                end_pass();
            }
            const float *dk_sums = n > 0 && gathered ? all_dk : dk, *dv_sums = n > 0 && gathered ? all_dv : dv;
            store_sums<T, U>(dkey + j0 * stride, stride, dk_sums, columns, n, d, in.options.scale, q_content);
            store_sums<T, U>(dvalue + j0 * stride, stride, dv_sums, columns, n, d, 1.0f, q_content);
            zero_rows(dkey + (j0 + n) * stride, stride, all - n, d);
            zero_rows(dvalue + (j0 + n) * stride, stride, all - n, d);
        }
        if (relative.segment_embedding != nullptr) add_segments();
    }

    // Keys and values that no row may see are not read into a product: a NaN in them would survive a weight of zero.
    PYXLBERT_INLINE void clear_block(std::int64_t j0, std::int64_t n) {
        const std::int32_t* ranks = relative.key_rank + p.k_first + j0;
        const std::int64_t stride = plan.unit_stride;
        clear_unseen<U>(ranks, n, k_values, plan.columns);
        for (std::int64_t j = 0; j < n; ++j)
            if (ranks[j] == UNSEEN_RANK)
                for (std::int64_t u = 0; u < stride; ++u) v[j / W * stride * W + u * W + j % W] = 0.0f;
    }

    // A plane's dQ from `parts` partial sums, `between` floats apart.
    void store_dquery(std::int64_t plane, float* sums, std::int64_t parts, std::int64_t between) {
        begin_plane(plane);
        const std::int64_t d = in.head_size, columns = plan.columns;
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                float* sum = sums + row * columns;
                for (std::int64_t part = 1; part < parts; ++part) add_row(sum, sum + part * between, columns);
                T* target =
                    static_cast<T*>(a.dquery[stream]) + ((queries[stream].first + index[row]) * in.heads + h) * d;
                store_row(target, sum, d, in.options.scale);
            }
    }
};

// The sequences of group `group` of table `table`, in order.
PYXLBERT_INLINE std::int64_t first_member(const Plan& plan, std::int64_t table, std::int64_t group) {
    return table * plan.members + plan.members * group / plan.groups;
}

// Rows first .. end - 1 of one head of a table: the sum over its groups and parts.
PYXLBERT_INLINE void store_dtable(const RelativeAttentionBwd& a, const Plan& plan, const float* partials,
                                  std::int64_t slice, std::int64_t first, std::int64_t end, float* sum) {
    const AttentionInputs& in = a.in.in;
    const std::int64_t table = slice / in.heads, h = slice % in.heads, columns = plan.columns;
    for (std::int64_t row = first; row < end; ++row) {
        for (std::int64_t c = 0; c < columns; c += W) store(sum + c, zero());
        for (std::int64_t set = 0; set < plan.groups * plan.parts; ++set) {
            const std::int64_t part = set % plan.parts, j0 = first_block(plan, part) * BACKWARD_BLOCK;
            const std::int64_t keys = smaller(first_block(plan, part + 1) * BACKWARD_BLOCK, in.keys) - j0;
            const std::int64_t at = row - (a.in.offset + j0 - plan.last_place);
            if (at < 0 || at >= keys + plan.last_place) continue;
            add_row(sum, partials + ((slice * plan.groups * plan.parts + set) * plan.table_rows + at) * columns,
                    columns);
        }
        store_row(a.dtable + ((table * a.in.table_rows + row) * in.heads + h) * in.head_size, sum, in.head_size,
                  in.options.scale);
    }
}

// One head's gradient of a bias or embedding: the sum over its sequences and parts.
PYXLBERT_INLINE void store_small(const RelativeAttentionBwd& a, const Plan& plan, const float* smalls, std::int64_t h,
                                 Small which, float* target, float* sum) {
    const AttentionInputs& in = a.in.in;
    for (std::int64_t c = 0; c < plan.columns; c += W) {
        Vec total = zero(), lost = zero();
        for (std::int64_t b = 0; b < in.batch; ++b)
            for (std::int64_t part = 0; part < plan.parts; ++part)
                add_exactly(
                    total, lost,
                    load(smalls + (((b * in.heads + h) * plan.parts + part) * SMALL + which) * plan.columns + c));
        store(sum + c, total);
    }
    store_row(target, sum, in.head_size, in.options.scale);
}

template <class T, class U>
void backward(const RelativeAttentionBwd& a) {
    const AttentionInputs& in = a.in.in;
    const Plan plan = make_plan<U>(a);
    const std::int64_t sets = plan.groups * plan.parts, tasks = plan.slices * sets;
    constexpr std::int64_t worth_a_thread = 1 << 17;  // multiplications
    const std::int64_t work = plan.planes * plan.rows * (in.keys + 1) * in.head_size;
    // Its memory has a bound for any number of threads.
    constexpr std::int64_t most_scratch = 96 << 20;
    const std::int64_t room = larger(1, most_scratch / (plan.task * static_cast<std::int64_t>(sizeof(float))));
    const std::int64_t wanted = smaller(smaller(in.threads, tasks), work / worth_a_thread);
    const int team = static_cast<int>(larger(1, smaller(wanted, room)));
    const std::int64_t one_table = plan.table_rows * plan.columns, columns = plan.columns;
    const std::int64_t all_tables = a.dtable != nullptr ? tasks * one_table : 0;
    const std::int64_t all_dquery = plan.parts > 1 ? plan.planes * plan.parts * plan.dquery : 0;
    const std::int64_t all_small = plan.planes * plan.parts * SMALL * columns;
    float* scratch = static_cast<float*>(workspace(Slot::tile, team * plan.task * sizeof(float)));
    float* smalls = static_cast<float*>(workspace(Slot::shared, (all_small + all_dquery + all_tables) * sizeof(float)));
    float *dqueries = smalls + all_small, *dtables = dqueries + all_dquery;

#pragma omp parallel num_threads(team)
    {
        if constexpr (TILES<U>) begin_tiles();
        Backward<T, U> worker(a, plan, scratch + thread_index() * plan.task);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t part = task % plan.parts, group = task / plan.parts % plan.groups, slice = task / sets;
            const std::int64_t table = slice / in.heads, h = slice % in.heads;
            worker.dtable = a.dtable == nullptr ? nullptr : dtables + task * one_table;
            worker.clear_table_sums();
            worker.first_row = a.in.offset + first_block(plan, part) * BACKWARD_BLOCK - plan.last_place;
            for (std::int64_t b = first_member(plan, table, group); b < first_member(plan, table, group + 1); ++b) {
                const std::int64_t plane = b * in.heads + h, run = plane * plan.parts + part;
                worker.small = smalls + run * SMALL * columns;
                worker.dquery = plan.parts == 1 ? worker.own_dquery : dqueries + run * plan.dquery;
                worker.run(plane, part);
                if (plan.parts == 1) worker.store_dquery(plane, worker.dquery, 1, 0);
            }
            worker.store_table_sums();
            finish_rows();
        }
        if constexpr (TILES<U>) end_tiles();
        if (plan.parts > 1) {
#pragma omp for schedule(dynamic, 1)
            for (std::int64_t plane = 0; plane < plan.planes; ++plane) {
                worker.store_dquery(plane, dqueries + plane * plan.parts * plan.dquery, plan.parts, plan.dquery);
                finish_rows();
            }
        }
        float* sum = worker.dq_tile;
        if (a.dtable != nullptr) {
            constexpr std::int64_t chunk = 64;
            const std::int64_t chunks = ceil_divide(a.in.table_rows, chunk);
#pragma omp for schedule(static)
            for (std::int64_t x = 0; x < plan.slices * chunks; ++x) {
                const std::int64_t first = x % chunks * chunk;
                store_dtable(a, plan, dtables, x / chunks, first, smaller(a.in.table_rows, first + chunk), sum);
                finish_rows();
            }
        }
#pragma omp for schedule(static)
        for (std::int64_t h = 0; h < in.heads; ++h) {
            const std::int64_t d = in.head_size;
            const auto store_bias = [&](Small which, float* target) {
                if (target != nullptr) store_small(a, plan, smalls, h, which, target + h * d, sum);
            };
            store_bias(content, a.dcontent_bias);
            store_bias(position, a.dposition_bias);
            store_bias(segment, a.dsegment_bias);
            store_bias(same_segment, a.dsegment_embedding);
            store_bias(other_segment, a.dsegment_embedding == nullptr ? nullptr : a.dsegment_embedding + in.heads * d);
            finish_rows();
        }
    }
}

}  // namespace

void relative_attention_bwd(const RelativeAttentionBwd& a) {
#if defined(__AMX_BF16__)
    if (a.in.in.dtype == DType::bfloat16)
        backward<bf16, UnitOf<bf16>::Type>(a);
    else
        avx512::relative_attention_bwd(a);
#else
    with_element(a.in.in.dtype, [&](auto element, auto) {
        using T = decltype(element);
        backward<T, typename UnitOf<T>::Type>(a);
    });
#endif
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
