// A task of relative attention's backward owns a run of key blocks of all sequences that share one head of a table (or
// of a group of them).  A block's keys, values and their gradients stay in the second-level cache while the tiles of
// queries pass by.  For every tile: the band of table rows that it meets is packed twice, as columns for the scores and
// as rows for dq; G_r is G copied row by row into a band of zeros; dr is summed in the task's own memory of a run's
// keys and the queries' rows.
//
// Where bfloat16 is multiplied in pairs, the sums over queries take P, G and G_r in pairs of rows, and the sums over
// keys take G and G_r rounded row by row: a row of G_r is then a row of G moved by a number of bfloat16.  Tiles sum dK,
// dV and dr transposed (backward_rows.h).
#pragma once
#include "relative_rows.h"
#include "relative_sums.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

template <class T, class U>
struct RelativeTask {
    // Rows of G_r take half the room in pairs, and leave the rest to pairs of rows.
    static constexpr std::int64_t DBAND_STRIDE = BAND_STRIDE / U::PAIR;

    const RelativeAttentionBwd& a;
    const RelativeCall& relative;
    const AttentionCall& in;
    const Plan& plan;
    const bool terms;
    Dropout dropout;
    float *scores, *dp, *band, *dband, *band_pairs, *q_content, *q_position, *dout, *content_values, *position_values,
        *dout_values, *dq_tile, *k, *v, *k_values, *undropped, *table, *table_values, *delta, *minus_lse_correction,
        *top, *same_sum, *other_sum, *same_score, *other_score, *one_row, *own_dquery;
    KeySums<U> key_sums;
    TableSums<U> table_sums;
    SmallSums small;
    std::int32_t *index, *place;  // of every row of the plane, the streams one after the other

    // The plane.
    Plane<T> p;
    std::int64_t b, h;
    Queries<T> queries[STREAMS];
    const T* dout_rows[STREAMS];
    std::int64_t start[STREAMS + 1];
    float* dquery;

    PYXLBERT_INLINE RelativeTask(const RelativeAttentionBwd& arguments, const Plan& with, float* scratch)
        : a(arguments),
          relative(arguments.in),
          in(arguments.in.in),
          plan(with),
          terms(has_terms(arguments.in.in) || has_relative_terms(&arguments.in)),
          dropout(make_dropout(arguments.in.in.dropout_p, arguments.in.in.seed, Tag::relative_attention)),
          key_sums{with, nullptr, nullptr, nullptr, nullptr, 0, 0, false},
          table_sums{with, nullptr, nullptr, nullptr, nullptr, 0, 0, 0, 0, 0},
          small{with.columns, nullptr, nullptr, nullptr} {
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
        key_sums.dk = take(plan.sums);
        key_sums.dv = take(plan.sums);
        key_sums.all_dk = take(plan.many_tiles ? plan.sums : 0);
        key_sums.all_dv = take(plan.many_tiles ? plan.sums : 0);
        undropped = take(SCORE_STRIDE);
        table = take(round_to(BACKWARD_BLOCK + SPAN, W) * plan.unit_stride);
        table_values = take(round_to(BACKWARD_BLOCK + SPAN, W) * columns);
        delta = take(rows);
        minus_lse_correction = take(rows);
        top = take(rows);
        same_sum = take(rows);
        other_sum = take(rows);
        index = reinterpret_cast<std::int32_t*>(take(rows));
        place = reinterpret_cast<std::int32_t*>(take(rows));
        same_score = take(TILE<U>);
        other_score = take(TILE<U>);
        one_row = take(3 * columns);
        small.run = take(SMALL * columns);
        small.lost = take(SMALL * columns);
        table_sums.own = take(plan.dtable);
        table_sums.lost = take(plan.gathers_table ? plan.table_rows * columns : 0);
        table_sums.room = q_content;  // the packed queries are used up
        own_dquery = scratch;
    }

    PYXLBERT_INLINE const T* query_row(int stream, std::int64_t row) const {
        return queries[stream].data + index[row] * queries[stream].stride;
    }
    PYXLBERT_INLINE const T* dout_row(int stream, std::int64_t row) const {
        return dout_rows[stream] + index[row] * a.dout[stream].row;
    }
    PYXLBERT_INLINE float lse_of(int stream, std::int64_t row) const {
        return a.streams[stream].lse[queries[stream].lse_first + index[row]];
    }

    void begin_plane(std::int64_t plane) {
        b = plane / in.heads;
        h = plane % in.heads;
        p = plane_of<T>(in, b, h);
        if (relative.options.uniform_rows) p.keys = p.all_keys;
        start[0] = 0;
        for (int stream = 0; stream < STREAMS; ++stream) {
            const Queries<T>& x = queries[stream] = queries_of<T>(in, a.streams[stream], b, h);
            const AttentionTensor& d = a.dout[stream];
            dout_rows[stream] =
                static_cast<const T*>(d.data) + (in.cu_seqlens != nullptr ? x.first * d.row : b * d.batch) + h * d.head;
            std::int64_t row = start[stream];
            for (std::int64_t at = first_at(x, 0); at < x.count; ++at, ++row) {
                index[row] = x.order != nullptr ? x.order[at] : static_cast<std::int32_t>(at);
                place[row] = x.positions != nullptr ? x.positions[index[row]] : index[row];
                same_sum[row] = other_sum[row] = minus_lse_correction[row] = 0.0f;
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
        // Rows that no query meets stay out of the products: 0 times what they hold may be NaN.
        const std::int64_t met =
            in.options.causal ? smaller(relative.table_rows, relative.offset + p.diagonal + 1) : relative.table_rows;
        const std::int64_t present = larger(0, smaller(width, met - first));
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
        const Stream& info = a.streams[stream];
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

    // Of the scores once their terms are added.
    PYXLBERT_INLINE float scale() const { return terms ? 1.0f : in.options.scale; }

    PYXLBERT_INLINE Exponent exponent_of(int stream, std::int64_t row) const {
        return {set1(scale()), set1(minus_exact_lse(lse_of(stream, row))), set1(minus_lse_correction[row])};
    }

    PYXLBERT_INLINE void pack_keys(std::int64_t j0, std::int64_t n) {
        pack_transposed<T, U>(p.k + j0 * p.k_stride, p.k_stride, n, round_to(n, W), in.head_size, k, plan.unit_stride);
    }

    // Calls work(stream, row, rows, n) for every tile of queries that may see some of the n keys from j0 on.
    template <class F>
    PYXLBERT_INLINE void for_tiles(std::int64_t j0, std::int64_t n, F work) {
        for (int stream = 0; stream < STREAMS; ++stream) {
            dropout.tag = a.streams[stream].options.tag;
            std::int64_t rows;
            for (std::int64_t row = start[stream]; row < start[stream + 1]; row += rows) {
                rows = 1;
                while (rows < TILE<U> && row + rows < start[stream + 1] && place[row + rows] - place[row] <= SPAN)
                    ++rows;
                std::int64_t seen = n;
                if (!relative.options.uniform_rows) seen = visible_keys(index[row + rows - 1], j0, n);
                seen = keys_in_sight(relative, p, queries[stream], a.streams[stream].options.see_self, index + row,
                                     rows, j0, seen);
                if (seen > 0) work(stream, row, rows, seen);
            }
        }
    }

    // See inexact_lse.
    void normalise() {
        bool any = false;
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                Top{top[row], delta[row]}.begin(scale());
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
                    Top{top[row + r], delta[row + r]}.add(scores + r * SCORE_STRIDE, own, scale());
                }
            });
        }
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row)
                if (inexact_lse(lse_of(stream, row))) minus_lse_correction[row] = -__builtin_log2f(delta[row]);
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
        const std::int64_t table_row = relative.offset + j0 - last - table_sums.first_row;
        sum_over_queries(rows, padded, n, width, table_row);
        key_sums.count_tile(n);
        table_sums.count_tile(table_row, width);
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
        const std::int64_t weighed = relative.options.uniform_rows ? n : visible;
        if (inexact_lse(lse_of(stream, row))) below_top(s, weighed, top[row], scale());
        differentiate(exponent_of(stream, row), dropout, p.plane, delta[row], s, g, undropped, i, j0, weighed, end,
                      p.keys <= BACKWARD_BLOCK);
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
            sum(dout, dout_values, {scores, W, 2 * SCORE_STRIDE}, {key_sums.dv, SUM_STRIDE}, n);
            sum(q_content, content_values, {scores + SCORE_STRIDE, W, 2 * SCORE_STRIDE}, {key_sums.dk, SUM_STRIDE}, n);
            if (table_sums.sums != nullptr)
                sum(q_position, position_values, {band_pairs, W, BAND_STRIDE},
                    {table_sums.own + first, plan.table_stride}, width);
        } else {
            const std::int64_t all_keys = round_to(n, 2), all_rows = round_to(width, 2);
            float* dr = table_sums.target(first);
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
                sum({scores, 2 * SCORE_STRIDE}, dout_values, steps, key_sums.dv, all_keys);
                sum({scores + SCORE_STRIDE, 2 * SCORE_STRIDE}, content_values, steps, key_sums.dk, all_keys);
                if (dr != nullptr) sum({band_pairs, BAND_STRIDE}, position_values, steps, dr, all_rows);
            } else {
                sum({scores, SCORE_STRIDE}, dout, rows, key_sums.dv, all_keys);
                sum({dp, SCORE_STRIDE}, q_content, rows, key_sums.dk, all_keys);
                if (dr != nullptr) sum({dband, DBAND_STRIDE}, q_position, rows, dr, all_rows);
            }
        }
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
            for (int v = 0; v < vectors; ++v) small.add(which, first + v * W, sum[v]);
        }
    }

    // What the segment term gives to dQ, to its bias and to both embeddings.
    void add_segments() {
        const std::int64_t d = in.head_size, columns = plan.columns;
        const float* same = of_head(relative.segment_embedding, h, d);
        pack_rows<float, FloatUnit>(same, 0, 1, d, one_row, 0, columns);
        pack_rows<float, FloatUnit>(same + in.heads * d, 0, 1, d, one_row + columns, 0, columns);
        float* biased = one_row + 2 * columns;
        small.begin_run();
        std::int64_t added = 0;
        for (int stream = 0; stream < STREAMS; ++stream)
            for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                pack_query<T, FloatUnit>(query_row(stream, row), of_head(relative.segment_bias, h, d), d, biased,
                                         columns);
                float* dq = dquery + row * columns;
                const auto add = [&](Small embedding, const float* e, float sum) PYXLBERT_LAMBDA {
                    add_row(dq, e, columns, sum);
                    add_row(small.run + segment * columns, e, columns, sum);
                    add_row(small.run + embedding * columns, biased, columns, sum);
                };
                add(same_segment, one_row, same_sum[row]);
                add(other_segment, one_row + columns, other_sum[row]);
                if (++added % RUN_LENGTH == 0) small.add_run();
            }
        small.add_run();
    }

    // Key blocks of run `part` of one plane.
    void run(std::int64_t plane, std::int64_t part) {
        begin_plane(plane);
        const std::int64_t d = in.head_size, columns = plan.columns, stride = in.heads * d;
        __builtin_memset(dquery, 0, start[STREAMS] * columns * sizeof(float));
        small.begin();
        normalise();
        if (p.keys > BACKWARD_BLOCK)
            for (int stream = 0; stream < STREAMS; ++stream)
                for (std::int64_t row = start[stream]; row < start[stream + 1]; ++row) {
                    const T* out = static_cast<const T*>(a.streams[stream].out) +
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
                key_sums.begin(n);
                table_sums.pass_tiles = 0;
                for_tiles(j0, n, [&](int stream, std::int64_t row, std::int64_t rows, std::int64_t seen) {
                    tile(stream, row, rows, j0, seen);
                });
                key_sums.end(n);
                table_sums.end_pass();
            }
            store_sums<T, U>(dkey + j0 * stride, stride, key_sums.whole_dk(), columns, n, d, in.options.scale,
                             q_content);
            store_sums<T, U>(dvalue + j0 * stride, stride, key_sums.whole_dv(), columns, n, d, 1.0f, q_content);
            zero_rows(dkey + (j0 + n) * stride, stride, all - n, d);
            zero_rows(dvalue + (j0 + n) * stride, stride, all - n, d);
        }
        if (relative.segment_embedding != nullptr) add_segments();
    }

    // Keys and values that no row may see are not read into a product: a NaN in them would survive a weight of zero.
    PYXLBERT_INLINE void clear_block(std::int64_t j0, std::int64_t n) {
        const std::int32_t* ranks = relative.key_rank + p.k_first + j0;
        const auto unseen = [&](std::int64_t j) PYXLBERT_LAMBDA { return ranks[j] == UNSEEN_RANK; };
        clear_values<U>(n, k_values, plan.columns, unseen);
        clear_transposed(n, v, plan.unit_stride, unseen);
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

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
