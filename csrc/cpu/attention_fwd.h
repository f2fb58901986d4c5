// The loops of attention's forward: softmax(scale * score, masked) v with no score ever in main memory.  The
// score is q k^T, or, RELATIVE, Transformer-XL's (q + u) k^T + skewed((q + v) r^T) + segments.
//
// A task is one (sequence, head), or a run of its queries when there are too few heads for the threads.  It takes
// a chunk of queries at a time, whose running maxima, sums and outputs stay in the second-level cache while blocks
// of keys pass by.  A block's keys, its values and the band of table rows that the chunk meets there are packed
// into the layouts of gemm_tile.h; then, for every tile of queries: scores, softmax row by row, weighted sum of the
// values.  bfloat16 weights are written over their own scores.  A row's result does not depend on how the queries
// are cut, so the number of threads may decide that.
//
// The skew costs nothing.  A tile of n queries meets a block of keys in n - 1 more table rows than keys.  The
// product with that band is stored with row stride S; score (r, j) lies at column j + (n - 1) - r, so it is read
// with row stride S - 1, as the value that the product with the keys starts from.  Rows that stand at positions of
// their own are taken in the order of their positions, and copied from the band instead.
//
// A call of few queries, a step of generation above all, is over before keys and values are packed: it takes them as
// they lie (few_queries.h), in float32.
#pragma once
#include "../workspace.h"
#include "attention_fwd_plan.h"
#include "few_queries.h"
#include "relative_rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Rows first .. end - 1 of a stream, in the order of their positions.
struct Run {
    std::int64_t first, end;
};

template <class T, class U, bool RELATIVE>
struct Forward {
    static constexpr int STREAMS = RELATIVE ? 2 : 1;

    const AttentionCall& in;
    const RelativeCall* relative;
    const Stream* streams;
    const Sizes& size;
    const bool terms;
    const bool few;  // nothing is packed; U is FloatUnit
    Dropout dropout;
    float *scores, *product, *q, *o, *k, *v, *maximum, *sum, *rescale;
    // A row of the chunk is query `index` of its stream and stands at `position`.
    std::int32_t *index, *position;
    // RELATIVE: (q + segment_bias) times either segment_embedding; q + position_bias, its product with the band,
    // and the band's rows of the table.
    float *same_segment, *other_segment, *q_position, *band, *table;

    std::int64_t packed_plane = -1, packed_block = -1;
    // The packed rows of the table; sequences that share a head of it follow each other, and mostly meet the same ones.
    const T* packed_table = nullptr;
    std::int64_t packed_table_rows = 0;
    std::int64_t first_table_row = 0;
    bool started[CHUNK<RELATIVE> / TILE_STEP + 8];

    PYXLBERT_INLINE Forward(const AttentionCall& inputs, const RelativeCall* relative_call, const Stream* given,
                            const Sizes& sizes, bool few_queries, float* scratch)
        : in(inputs),
          relative(relative_call),
          streams(given),
          size(sizes),
          terms(has_terms(inputs) || has_relative_terms(relative_call)),
          few(few_queries),
          dropout(make_dropout(inputs.dropout_p, inputs.seed, Tag::attention)) {
        const auto take = [&](std::int64_t floats) PYXLBERT_LAMBDA {
            float* taken = scratch;
            scratch += floats;
            return taken;
        };
        scores = take(TILE<U> * SCORE_STRIDE);
        product = take(size.product);
        q = take(size.q);
        o = take(size.o);
        k = take(size.k);
        v = take(size.v);
        if constexpr (RELATIVE) {
            q_position = take(size.q);
            band = take(TILE<U> * BAND_STRIDE);
            table = take(size.table * size.unit_stride);
        }
        const std::int64_t rows = round_to(size.chunk, 16);
        maximum = take(rows);
        sum = take(rows);
        index = reinterpret_cast<std::int32_t*>(take(rows));
        position = reinterpret_cast<std::int32_t*>(take(rows));
        same_segment = take(rows);
        other_segment = take(rows);
        rescale = take(TILE<U>);
    }

    // Queries `run` of a stream to rows `at` .. of the chunk, and zeros up to the end of the last tile.
    PYXLBERT_INLINE void load_rows(const Queries<T>& x, std::int64_t h, Run run, std::int64_t at) {
        const std::int64_t d = in.head_size, rows = run.end - run.first;
        const float *content_bias = nullptr, *position_bias = nullptr;
        if constexpr (RELATIVE) {
            content_bias = of_head(relative->content_bias, h, d);
            position_bias = of_head(relative->position_bias, h, d);
        }
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t row = at + r;
            const std::int64_t i = x.order != nullptr ? x.order[run.first + r] : run.first + r;
            index[row] = static_cast<std::int32_t>(i);
            position[row] = x.positions != nullptr ? x.positions[i] : index[row];
            maximum[row] = -INFINITY_;
            sum[row] = 0.0f;
            const T* source = x.data + i * x.stride;
            pack_query<T, U>(source, content_bias, d, q + row * size.unit_stride, size.unit_stride);
            if constexpr (RELATIVE) {
                pack_query<T, U>(source, position_bias, d, q_position + row * size.unit_stride, size.unit_stride);
                if (relative->segment_embedding != nullptr) {
                    const float* bias = of_head(relative->segment_bias, h, d);
                    const float* same = of_head(relative->segment_embedding, h, d);
                    same_segment[row] = segment_score(source, bias, same, d);
                    other_segment[row] = segment_score(source, bias, same + in.heads * d, d);
                }
            }
        }
        const std::int64_t from = (at + rows) * size.unit_stride, to = round_to(at + rows, TILE<U>) * size.unit_stride;
        for (std::int64_t u = from; u < to; u += W) {
            store(q + u, zero());
            if constexpr (RELATIVE) store(q_position + u, zero());
        }
        for (std::int64_t step = at / TILE_STEP; step * TILE_STEP < at + rows; ++step) started[step] = false;
    }

    // Keys j0 .. j0 + n - 1, and what queries at positions lowest .. highest meet of the table there.
    PYXLBERT_INLINE void pack(const Plane<T>& p, std::int64_t b, std::int64_t h, std::int64_t j0, std::int64_t n,
                              [[maybe_unused]] std::int64_t lowest, [[maybe_unused]] std::int64_t highest) {
        const std::int64_t d = in.head_size, all = smaller(FORWARD_BLOCK, p.keys - j0);
        if (packed_plane != p.plane || packed_block != j0) {
            packed_plane = p.plane;
            packed_block = j0;
            pack_transposed<T, U>(p.k + j0 * p.k_stride, p.k_stride, all, round_to(all, W), d, k, size.unit_stride);
            pack_values<T, U>(p.v + j0 * p.v_stride, p.v_stride, all, round_to(all, U::PAIR * U::K_STEP), d, v,
                              size.columns);
            if constexpr (RELATIVE)
                if (relative->key_rank != nullptr) {
                    const std::int32_t* rank = relative->key_rank + p.k_first + j0;
                    if (!relative->options.uniform_rows)
                        clear_values<U>(all, v, size.columns,
                                        [&](std::int64_t j) PYXLBERT_LAMBDA { return rank[j] == UNSEEN_RANK; });
                }
            // Of relative attention such keys have the rank UNSEEN_RANK.
            std::uint8_t unseen[FORWARD_BLOCK];
            if (!RELATIVE && find_hidden<FORWARD_BLOCK>(p, j0, all, unseen))
                clear_values<U>(all, v, size.columns, [&](std::int64_t j) PYXLBERT_LAMBDA { return unseen[j] != 0; });
        }
        if constexpr (RELATIVE) {
            const std::int64_t rows = n + highest - lowest;
            first_table_row = relative->offset + j0 - highest;
            const std::int64_t present = larger(0, smaller(rows, relative->table_rows - first_table_row));
            const AttentionTensor& r = relative->table;
            const T* source = static_cast<const T*>(r.data) + b * relative->tables / in.batch * r.batch + h * r.head +
                              first_table_row * r.row;
            if (packed_table == source && packed_table_rows == rows) return;
            packed_table = source;
            packed_table_rows = rows;
            pack_transposed<T, U>(source, r.row, present, round_to(rows, W), d, table, size.unit_stride);
        }
    }

    // The product of rows row .. row + rows - 1, whose last one stands at `last`, with the band of n keys and `span`
    // positions.  Returns the column of the last row's score at key j0.
    PYXLBERT_INLINE std::int64_t multiply_band(std::int64_t row, std::int64_t rows, std::int64_t last,
                                               std::int64_t span, std::int64_t j0, std::int64_t n) {
        const std::int64_t first = relative->offset + j0 - last - first_table_row, column = first % W;
        multiply<U, false>({q_position + row * size.unit_stride, size.unit_stride},
                           {table + (first - column) * size.unit_stride, size.unit_stride * W, W}, size.units, nullptr,
                           0, {band, BAND_STRIDE}, round_to(rows, U::ROW_STEP), (column + n + span + W - 1) / W);
        return column;
    }

    // Position scores of rows at positions of their own, copied to `scores`.
    PYXLBERT_INLINE void copy_band(std::int64_t row, std::int64_t rows, std::int64_t j0, std::int64_t n) {
        for (std::int64_t first = 0, end; first < rows; first = end) {
            end = first + 1;
            while (end < rows && position[row + end] - position[row + first] <= SPAN) ++end;
            const std::int64_t last = position[row + end - 1];
            const std::int64_t column =
                multiply_band(row + first, end - first, last, last - position[row + first], j0, n);
            for (std::int64_t r = first; r < end; ++r) {
                const float* source = band + (r - first) * BAND_STRIDE + column + last - position[row + r];
                for (std::int64_t j = 0; j < n; j += W) store(scores + r * SCORE_STRIDE + j, load(source + j));
            }
        }
    }

    // Scores of one row, n of them visible, to weights; those up to `end` are zero.  Updates the row's
    // statistics and leaves in rescale[r] what its earlier output must be multiplied by.
    PYXLBERT_INLINE void softmax(const Plane<T>& p, const Queries<T>& x, const Stream& stream, std::int64_t row,
                                 std::int64_t r, std::int64_t j0, std::int64_t n, std::int64_t end) {
        float* s = scores + r * SCORE_STRIDE;
        const std::int64_t i = index[row];
        if (terms) {
            if constexpr (RELATIVE) {
                const std::int64_t mask_row = stream.options.mask_by_position ? position[row] : i;
                add_relative_terms(*relative, p, s, {same_segment[row], other_segment[row]}, x.rank, x.segment,
                                   stream.options.see_self, i, mask_row, j0, n);
                if (relative->options.uniform_rows) {
                    fill_from(s, n, round_to(end, W), UNIFORM_SCORE);
                    n = end;
                }
            } else {
                add_terms(in, p, s, i, j0, n);
            }
        }
        const std::int64_t padded = round_to(n, 2 * W);
        fill_from(s, n, padded, -INFINITY_);
        Vec m0 = set1(-INFINITY_), m1 = m0;
        for (std::int64_t j = 0; j < padded; j += 2 * W) {
            m0 = max(m0, load(s + j));
            m1 = max(m1, load(s + j + W));
        }
        const float before = maximum[row], block = reduce_max(max(m0, m1));
        const float now = block > before ? block : before;
        // With nothing seen yet every exponent is -inf, whatever is subtracted.
        const float base = now == -INFINITY_ ? 0.0f : now;
        const float factor = terms ? LOG2E : in.options.scale * LOG2E;
        constexpr int DEGREE = U::PAIR == 2 ? 3 : 5;
        const auto weight = [&](std::int64_t j) PYXLBERT_LAMBDA {
            return exp2_nonpositive<DEGREE>((load(s + j) - set1(base)) * set1(factor));
        };
        Vec l0 = zero(), l1 = zero();
        for (std::int64_t j = 0; j < padded; j += 2 * W) {
            const Vec w0 = weight(j), w1 = weight(j + W);
            l0 += w0;
            l1 += w1;
            if (U::PAIR == 2 && !dropout.active) {
#if defined(__AVX512BF16__)
                _mm512_storeu_si512(s + j / 2, round_pair(w0, w1));
#endif
            } else {
                store(s + j, w0);
                store(s + j + W, w1);
            }
        }
        // The first block, most often the only one, has nothing to scale; a maximum that stays leaves what is there as
        // it is, where the polynomial would take a rounding off it.
        rescale[r] = before == -INFINITY_ ? 0.0f : before == now ? 1.0f : exp2_scalar((before - base) * factor);
        sum[row] = sum[row] * rescale[r] + reduce_add(l0 + l1);
        maximum[row] = now;
        if (dropout.active) drop_row(p, s, i, j0, padded);
        const std::int64_t from = padded / U::PAIR, to = round_to(end, W * U::PAIR) / U::PAIR;
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
                if constexpr (U::PAIR == 2) {
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

    // A row of the chunk and keys j0 .. j0 + n - 1, as they lie.
    PYXLBERT_INLINE void single(const Plane<T>& p, std::int64_t b, std::int64_t h, const Queries<T>& x,
                                const Stream& stream, std::int64_t row, std::int64_t j0, std::int64_t n) {
        const std::int64_t d = in.head_size;
        bool all = false;
        if constexpr (RELATIVE) all = relative->options.uniform_rows;
        if (!all) n = smaller(n, p.visible(index[row], in.options.causal, p.keys) - j0);
        if (n <= 0) return;
        multiply_rows<false>(q + row * size.unit_stride, p.k + j0 * p.k_stride, p.k_stride, n, d, scores);
        if constexpr (RELATIVE) {
            const AttentionTensor& r = relative->table;
            const std::int64_t first = relative->offset + j0 - position[row];
            const std::int64_t present = larger(0, smaller(n, relative->table_rows - first));
            const T* band_rows =
                static_cast<const T*>(r.data) + b * relative->tables / in.batch * r.batch + h * r.head + first * r.row;
            multiply_rows<true>(q_position + row * size.unit_stride, band_rows, r.row, present, d, scores);
        }
        const std::int64_t visible = p.visible(index[row], in.options.causal, p.seen_keys) - j0;
        softmax(p, x, stream, row, 0, j0, visible < 0 ? 0 : smaller(visible, n), n);
        add_weighted_rows(scores, p.v + j0 * p.v_stride, p.v_stride, n, d, rescale[0], o + row * size.columns);
    }

    // Rows row .. of the chunk, one tile, and keys j0 .. j0 + n - 1.
    void tile(const Plane<T>& p, const Queries<T>& x, const Stream& stream, std::int64_t row, std::int64_t rows,
              std::int64_t j0, std::int64_t n) {
        const bool causal = in.options.causal;
        if constexpr (RELATIVE) {
            if (!relative->options.uniform_rows) n = smaller(n, p.visible(index[row + rows - 1], causal, p.keys) - j0);
            n = keys_in_sight(*relative, p, x, stream.options.see_self, index + row, rows, j0, n);
        } else {
            n = smaller(n, p.visible(index[row + rows - 1], causal, p.keys) - j0);
        }
        if (n <= 0) return;
        const std::int64_t padded = round_to(rows, U::ROW_STEP);
        const float* init = nullptr;
        std::int64_t init_stride = 0;
        if constexpr (RELATIVE) {
            if (x.positions == nullptr) {
                init = band + multiply_band(row, rows, index[row + rows - 1], rows - 1, j0, n) + rows - 1;
                init_stride = BAND_STRIDE - 1;
            } else {
                copy_band(row, rows, j0, n);
                init = scores;
                init_stride = SCORE_STRIDE;
            }
        }
        multiply<U, false>({q + row * size.unit_stride, size.unit_stride}, {k, size.unit_stride * W, W}, size.units,
                           init, init_stride, {scores, SCORE_STRIDE}, padded, (n + W - 1) / W);
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t visible = p.visible(index[row + r], causal, p.seen_keys) - j0;
            softmax(p, x, stream, row + r, r, j0, visible < 0 ? 0 : smaller(visible, n), n);
        }
        float* out = o + row * size.columns;
        const bool accumulate = started[row / TILE_STEP];
        for (std::int64_t r = 0; r < rows; r += TILE_STEP) started[(row + r) / TILE_STEP] = true;
        multiply<U, false>({scores, SCORE_STRIDE}, {v, W, size.columns},
                           round_to((n + U::PAIR - 1) / U::PAIR, U::K_STEP), nullptr, 0,
                           {accumulate ? product : out, size.columns}, padded, size.columns / W);
        if (!accumulate) return;
        // A block's product is summed by itself: added to one by one, a long sum of one sign would drift.
        for (std::int64_t r = 0; r < rows; ++r) {
            float* at = out + r * size.columns;
            const float* of_block = product + r * size.columns;
            for (std::int64_t c = 0; c < size.columns; c += W)
                store(at + c, fma(load(at + c), set1(rescale[r]), load(of_block + c)));
        }
    }

    PYXLBERT_INLINE void store_rows(const Queries<T>& x, const Stream& stream, std::int64_t h, std::int64_t row,
                                    std::int64_t rows) {
        for (std::int64_t end = row + rows; row < end; ++row) {
            const bool dead = sum[row] == 0.0f;
            float lse = INFINITY_;
            if (!dead && stream.lse != nullptr)
                lse = maximum[row] * (terms ? 1.0f : in.options.scale) + __builtin_logf(sum[row]);
            // A dead row may not have been written at all, so its output is not multiplied but replaced.
            store_row(x, stream, h, index[row], lse, dead ? nullptr : o + row * size.columns,
                      dead ? 0.0f : 1.0f / sum[row]);
        }
    }

    // o null: zeros.
    PYXLBERT_INLINE void store_row(const Queries<T>& x, const Stream& stream, std::int64_t h, std::int64_t i, float lse,
                                   const float* source, float factor) {
        const std::int64_t d = in.head_size;
        T* target = static_cast<T*>(stream.out) + ((x.first + i) * in.heads + h) * d;
        if (stream.lse != nullptr) stream.lse[x.lse_first + i] = lse;
        const auto value = [&](std::int64_t c)
                               PYXLBERT_LAMBDA { return source == nullptr ? zero() : load(source + c) * set1(factor); };
        std::int64_t c = 0;
        for (; c + W <= d; c += W) store(target + c, value(c));
        if (c < d) store(target + c, value(c), static_cast<int>(d - c));
    }

    void chunk(const Plane<T>& p, std::int64_t b, std::int64_t h, const Queries<T>* queries, const Run* runs) {
        std::int64_t start[STREAMS], lowest = FARTHEST, highest = -1, at = 0;
        for (int stream = 0; stream < STREAMS; ++stream) {
            const std::int64_t rows = runs[stream].end - runs[stream].first;
            start[stream] = at;
            if (rows == 0) continue;
            load_rows(queries[stream], h, runs[stream], at);
            lowest = smaller(lowest, position[at]);
            highest = larger(highest, position[at + rows - 1]);
            at = round_to(at + rows, TILE<U>);
        }
        // Causal sequences have no second stream.
        const bool all = !in.options.causal || (RELATIVE && relative->options.uniform_rows);
        const std::int64_t limit = all ? p.keys : p.visible(highest, true, p.keys);
        for (std::int64_t j0 = 0; j0 < limit; j0 += FORWARD_BLOCK) {
            const std::int64_t n = smaller(FORWARD_BLOCK, limit - j0);
            if (!few) pack(p, b, h, j0, n, lowest, highest);
            for (int stream = 0; stream < STREAMS; ++stream) {
                dropout.tag = streams[stream].options.tag;
                const std::int64_t rows = runs[stream].end - runs[stream].first;
                if (few) {
                    for (std::int64_t r = start[stream]; r < start[stream] + rows; ++r)
                        single(p, b, h, queries[stream], streams[stream], r, j0, n);
                    continue;
                }
                for (std::int64_t r = 0, step = tile_rows<U, RELATIVE>(n); r < rows; r += step)
                    tile(p, queries[stream], streams[stream], start[stream] + r, smaller(step, rows - r), j0, n);
            }
        }
        for (int stream = 0; stream < STREAMS; ++stream)
            store_rows(queries[stream], streams[stream], h, start[stream], runs[stream].end - runs[stream].first);
    }

    // All rows at places first .. end - 1 of one plane.
    void places(std::int64_t plane, std::int64_t first, std::int64_t end) {
        const std::int64_t b = plane / in.heads, h = plane % in.heads;
        Plane<T> p = plane_of<T>(in, b, h);
        if constexpr (RELATIVE)
            if (relative->options.uniform_rows) p.keys = p.all_keys;
        Queries<T> queries[STREAMS];
        Run left[STREAMS];
        for (int stream = 0; stream < STREAMS; ++stream) {
            queries[stream] = queries_of<T>(in, streams[stream], b, h);
            left[stream] = {first_at(queries[stream], first), first_at(queries[stream], end)};
            if (first == 0)
                for (std::int64_t x = 0; x < left[stream].first; ++x)
                    store_row(queries[stream], streams[stream], h, queries[stream].order[x], INFINITY_, nullptr, 0.0f);
        }
        const auto place = [&](int stream) PYXLBERT_LAMBDA {
            const Queries<T>& x = queries[stream];
            const std::int64_t at = left[stream].first;
            if (at == left[stream].end) return FARTHEST;
            return x.positions == nullptr ? at : static_cast<std::int64_t>(x.positions[x.order[at]]);
        };
        for (;;) {
            Run runs[STREAMS];
            std::int64_t rows = 0;
            if constexpr (RELATIVE) {
                for (int stream = 0; stream < STREAMS; ++stream)
                    runs[stream] = {left[stream].first, left[stream].first};
                const std::int64_t lowest = smaller(place(0), place(1));
                for (; rows < CHUNK<true>; ++rows) {
                    const int next = place(1) < place(0);
                    if (place(next) == FARTHEST || place(next) - lowest >= CHUNK<true>) break;
                    runs[next].end = ++left[next].first;
                }
            } else {
                runs[0] = {left[0].first, smaller(left[0].end, left[0].first + CHUNK<false>)};
                left[0].first = runs[0].end;
                rows = runs[0].end - runs[0].first;
            }
            if (rows == 0) return;
            chunk(p, b, h, queries, runs);
        }
    }
};

template <class T, class U, bool RELATIVE>
void run_forward_in(const AttentionCall& in, const RelativeCall* relative, const Stream* streams, bool few) {
    const std::int64_t rows = streams[0].count + (RELATIVE ? streams[1].count : 0);
    const bool apart = streams[0].positions != nullptr || (RELATIVE && streams[1].positions != nullptr);
    const Sizes size = sizes_of<U, RELATIVE>(in, rows, apart);
    // Positions are below the table's offset.
    std::int64_t all_places = larger(1, streams[0].count);
    if constexpr (RELATIVE)
        if (streams[0].positions != nullptr) all_places = relative->offset + 1;
    const std::int64_t planes = in.batch * in.heads, tiles = (all_places + TILE<U> - 1) / TILE<U>;
    // Every task of a plane packs its keys again, so there are only as many as keep the threads busy.
    std::int64_t parts = planes >= 4 * in.threads ? 1 : smaller((4 * in.threads + planes - 1) / planes, tiles);
    const std::int64_t places_per_part = (tiles + parts - 1) / parts * TILE<U>;
    parts = (all_places + places_per_part - 1) / places_per_part;
    const std::int64_t tasks = planes * parts;
    constexpr std::int64_t worth_a_thread = 1 << 17;  // multiplications
    const std::int64_t work = planes * rows * (in.keys + 1) * in.head_size;
    std::int64_t team = larger(1, smaller(smaller(in.threads, tasks), work / worth_a_thread));
    // Relative attention promises a bound on its memory for any number of threads.
    constexpr std::int64_t max_scratch = 48 << 20;
    if constexpr (RELATIVE) team = larger(1, smaller(team, max_scratch / (size.total * 4)));
    float* scratch = static_cast<float*>(workspace(Slot::tile, team * size.total * sizeof(float)));

    std::int64_t next = 0;
    in_team(static_cast<int>(team), [&](int thread, int) PYXLBERT_WORK {
        Forward<T, U, RELATIVE> worker(in, relative, streams, size, few, scratch + thread * size.total);
        if constexpr (U::ROW_STEP == 16) begin_tiles();
        for (;;) {
            const std::int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= tasks) break;
            const std::int64_t part = task % parts, turn = task / parts;
            const std::int64_t plane = RELATIVE ? turn % in.batch * in.heads + turn / in.batch : turn;
            worker.places(plane, part * places_per_part, part + 1 == parts ? FARTHEST : (part + 1) * places_per_part);
        }
        if constexpr (U::ROW_STEP == 16) end_tiles();
    });
}

// `streams` are two if RELATIVE, one else; the second may have no rows.
template <class T, class U, bool RELATIVE>
void run_forward(const AttentionCall& in, const RelativeCall* relative, const Stream* streams) {
    const std::int64_t rows = streams[0].count + (RELATIVE ? streams[1].count : 0);
    if (rows == 0) return;
    if (rows <= FEW_QUERIES && in.cu_seqlens == nullptr)
        run_forward_in<T, FloatUnit, RELATIVE>(in, relative, streams, true);
    else
        run_forward_in<T, U, RELATIVE>(in, relative, streams, false);
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
