// The embeddings of BERT in one pass: three rows gathered and summed, LayerNorm, dropout.
//
// Forward sums the rows of a token into a float buffer that stays in L1 and normalises it there; nothing but
// the tables is read and nothing but the result written.  Backward gathers the rows again instead of keeping
// the sum: reading a table row costs what reading a saved sum would, without the memory.  It writes the
// gradient dx of the sum, which is the gradient of each gathered row, and a second kernel adds dx into each
// table: tokens sorted by the row they took, so that every table row is summed by one thread in token order
// and the bits do not depend on the number of threads.
#include "embedding_layer_norm.h"

#include "philox.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

template <class T>
PYXLBERT_INLINE const T* row_of(const EmbeddingTable& table, std::int64_t token, std::int64_t columns) {
    if (table.rows == nullptr) return nullptr;
    const std::int64_t row = table.index != nullptr ? table.index[token] : token % table.period;
    return static_cast<const T*>(table.rows) + row * columns;
}

// The up to three rows of a token and their sum at a column.
template <class T>
struct Sum {
    const T *word, *position, *token_type;

    PYXLBERT_INLINE Vec at(std::int64_t j, int count) const {
        Vec v = load_some(word + j, count);
        if (position != nullptr) v += load_some(position + j, count);
        if (token_type != nullptr) v += load_some(token_type + j, count);
        return v;
    }
};

template <class T>
PYXLBERT_INLINE Sum<T> sum_of(const EmbeddingTable& word, const EmbeddingTable& position,
                              const EmbeddingTable& token_type, std::int64_t token, std::int64_t columns) {
    return {row_of<T>(word, token, columns), row_of<T>(position, token, columns),
            row_of<T>(token_type, token, columns)};
}

// Applies the dropout bits of a row to its float buffer; the buffer is padded to 4 * W columns.
PYXLBERT_INLINE void drop_row(const Dropout& dropout, std::int64_t row, float* values, std::int64_t columns) {
    for (std::int64_t j = 0; j < columns; j += 4 * W) {
        VecU words[4];
        dropout_words(dropout, static_cast<std::uint32_t>(j), static_cast<std::uint32_t>(row),
                      static_cast<std::uint32_t>(row >> 32), words);
        for (int k = 0; k < 4; ++k) store(values + j + k * W, drop(dropout, words[k], load(values + j + k * W)));
    }
}

template <class T>
void forward(const EmbeddingLayerNormFwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, 4 * W);
    float* parameters = static_cast<float*>(workspace(Slot::shared, 2 * padded * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, parameters);
    const float* bias = as_float(a.bias, a.bias_dtype, n, parameters + padded);
    const Dropout dropout = make_dropout(a.dropout_p, a.seed, Tag::embedding_layer_norm);
    const TeamScratch scratch_rows = team_scratch(team(a.threads, a.rows * n), padded);

#pragma omp parallel num_threads(scratch_rows.threads)
    {
        float* row = scratch_rows.mine();
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < a.rows; ++i) {
            const Sum<T> x = sum_of<T>(a.word, a.position, a.token_type, i, n);
            Vec total = zero();
            for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
                const Vec v = x.at(j, count);
                store(row + j, v);
                total += v;
            });
            const auto [mean, rstd] = statistics(row, n, total, a.eps);
            normalised(row, n, mean, rstd, weight, bias,
                       [&](std::int64_t j, int, Vec v) PYXLBERT_LAMBDA { store(row + j, v); });
            if (dropout.active) drop_row(dropout, i, row, n);
            with_type(a.out_dtype, [&](auto type) { narrow_row(row, static_cast<decltype(type)*>(a.y) + i * n, n); });
            if (a.y_copy != nullptr)
                with_type(a.copy_dtype,
                          [&](auto type) { narrow_row(row, static_cast<decltype(type)*>(a.y_copy) + i * n, n); });
            a.mean[i] = mean;
            a.rstd[i] = rstd;
        }
    }
}

template <class T, class G>
void backward(const EmbeddingLayerNormBwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, 4 * W);
    const int blocks = row_blocks(a.rows);
    const bool sums = a.dweight != nullptr || a.dbias != nullptr;
    const std::int64_t partial_stride = 2 * padded;
    float* shared =
        static_cast<float*>(workspace(Slot::shared, (padded + (sums ? blocks * partial_stride : 0)) * sizeof(float)));
    const float* weight = as_float(a.weight, a.weight_dtype, n, shared);
    float* partial = shared + padded;
    const Dropout dropout = make_dropout(a.dropout_p, a.seed, Tag::embedding_layer_norm);
    const TeamScratch scratch_rows =
        team_scratch(team(a.threads, a.rows * n), 2 * padded + RowSums::room(partial_stride));

#pragma omp parallel num_threads(scratch_rows.threads)
    {
        float* gradient = scratch_rows.mine();
        float* xhat = gradient + padded;
#pragma omp for schedule(static)
        for (int b = 0; b < blocks; ++b) {
            const std::int64_t first = block_start(a.rows, blocks, b), end = block_start(a.rows, blocks, b + 1);
            RowSums rows(partial + b * partial_stride, xhat + padded, sums ? partial_stride : 0, end - first);
            float *dweight = rows.run, *dbias = dweight + padded;
            for (std::int64_t i = first; i < end; ++i) {
                const Sum<T> x = sum_of<T>(a.word, a.position, a.token_type, i, n);
                widen_row(static_cast<const G*>(a.dy) + i * a.dy_stride, gradient, n);
                if (dropout.active) drop_row(dropout, i, gradient, n);
                RowGradient g = {set1(a.mean[i]), set1(a.rstd[i]), xhat, gradient, zero(), zero()};
                g.walk(
                    n, weight, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { return x.at(j, count); },
                    [&](std::int64_t j, int count) PYXLBERT_LAMBDA { return load_some(gradient + j, count); }, sums,
                    dweight, dbias);
                float* dx = a.dx + i * n;
                for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { store_some(dx + j, g.dx(j), count); });
                rows.next_row();
            }
            rows.finish();
        }
    }
    if (!sums) return;
    add_blocks(partial, blocks, partial_stride, partial_stride);
    if (a.dweight != nullptr) from_float(partial, a.dweight, a.weight_dtype, n);
    if (a.dbias != nullptr) from_float(partial + padded, a.dbias, a.bias_dtype, n);
}

// A task is a run of equal indices and a chunk of columns; columns are split because a table of two token
// types would keep only two threads busy.
template <class T>
void scatter(const EmbeddingScatter& a) {
    constexpr std::int64_t CHUNK = 64;
    const std::int64_t n = a.columns, chunks = (n + CHUNK - 1) / CHUNK;
    std::int64_t* starts = static_cast<std::int64_t*>(workspace(Slot::shared, (a.rows + 1) * sizeof(std::int64_t)));
    std::int64_t runs = 0;
    for (std::int64_t k = 0; k < a.rows; ++k)
        if (k == 0 || a.index[a.order[k]] != a.index[a.order[k - 1]]) starts[runs++] = k;
    starts[runs] = a.rows;

#pragma omp parallel for schedule(static) num_threads(team(a.threads, a.rows* n))
    for (std::int64_t task = 0; task < runs * chunks; ++task) {
        const std::int64_t run = task / chunks, first = task % chunks * CHUNK;
        const std::int64_t entry = a.index[a.order[starts[run]]];
        if (entry == a.skip) continue;
        const std::int64_t width = first + CHUNK <= n ? CHUNK : n - first;
        T* target = static_cast<T*>(a.dtable) + entry * n + first;
        const auto lanes = [&](int v) PYXLBERT_LAMBDA {
            const std::int64_t left = width - v * W;
            return static_cast<int>(left < W ? left : W);
        };
        const int vectors = static_cast<int>((width + W - 1) / W);
        Vec total[CHUNK / W], lost[CHUNK / W];
        for (int v = 0; v < vectors; ++v) total[v] = lost[v] = zero();
        for (std::int64_t k = starts[run]; k < starts[run + 1];) {
            const std::int64_t left = starts[run + 1] - k, end = k + (left < RUN_LENGTH ? left : RUN_LENGTH);
            Vec sum[CHUNK / W];
            for (int v = 0; v < vectors; ++v) sum[v] = zero();
            for (; k < end; ++k) {
                const float* row = a.dx + a.order[k] * n + first;
                if (width == CHUNK)
                    for (int v = 0; v < CHUNK / W; ++v) sum[v] += load(row + v * W);
                else
                    for (int v = 0; v < vectors; ++v) sum[v] += load(row + v * W, lanes(v));
            }
            for (int v = 0; v < vectors; ++v) add_exactly(total[v], lost[v], sum[v]);
        }
        for (int v = 0; v < vectors; ++v) store(target + v * W, total[v], lanes(v));
    }
}

}  // namespace

void embedding_layer_norm_fwd(const EmbeddingLayerNormFwd& arguments) {
    with_type(arguments.table_dtype, [&](auto type) { forward<decltype(type)>(arguments); });
}

void embedding_layer_norm_bwd(const EmbeddingLayerNormBwd& arguments) {
    with_type(arguments.table_dtype, [&](auto type) {
        with_type(arguments.dy_dtype, [&](auto gradient) { backward<decltype(type), decltype(gradient)>(arguments); });
    });
}

void embedding_scatter(const EmbeddingScatter& arguments) {
    with_type(arguments.table_dtype, [&](auto type) { scatter<decltype(type)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
