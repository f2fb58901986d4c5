// embedding_layer_norm: look-ups, sum, LayerNorm and dropout in one pass; tables' gradients without atomics.
//
//     ids [M]  ->  word[id] + position[place] + token_type[type], in float32  ->  y, its copy
//     dy       ->  dx [M, N] of the sum, in float32; then, for every table, its tokens in the order of their rows:
//
//     sorted rows   3 3 3 5 | 5 5 5 5 | 5 8 9 9 | 9 ..      a block walks a chunk of CHUNK tokens and adds up runs
//                   `-3-'       the run of 5 crosses chunks: each chunk's share of the run that it begins with, and of
//                               the run that goes on behind it, is a row of its own, added up in order by join_runs
//
// A row out of its table's range is never read: its token's result is NaN, and it adds to no gradient.
#include "cuda/embedding_layer_norm.h"

#include "cuda/philox.cuh"
#include "cuda/rows.cuh"

namespace pyxlbert::cuda {
namespace {

constexpr Tag TAG = Tag::embedding_layer_norm;

DEVICE std::int64_t row_at(const void* index, bool wide, std::int64_t token) {
    return wide ? static_cast<const std::int64_t*>(index)[token] : static_cast<const std::int32_t*>(index)[token];
}

// The row of a table that a token takes, `otherwise` without an index; one that is not there is row 0 and not good.
DEVICE std::int64_t row_of(const Table& table, std::int64_t token, std::int64_t otherwise, bool& good) {
    if (table.index == nullptr) return otherwise;
    const std::int64_t row = row_at(table.index, table.wide, token);
    const bool there = row >= 0 && row < table.size;
    good = good && there;
    return there ? row : 0;
}

// word + position + token type of a token; whether all of its rows are there.
template <class T, class S>
DEVICE bool sum_of(const EmbeddingTables& tables, std::int64_t token, float (&x)[S::VECTORS][S::VEC]) {
    const int columns = static_cast<int>(tables.columns);
    bool good = true;
    auto add = [&](const Table& table, std::int64_t otherwise) {
        if (table.rows == nullptr) return;
        const std::int64_t row = row_of(table, token, otherwise, good);
        const T* source = static_cast<const T*>(table.rows) + row * tables.columns;
        each_vector<S>(columns, [&](int v, int column) {
            float more[S::VEC];
            load<S::VEC>(source + column, more);
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) x[v][e] += more[e];
        });
    };
    if (tables.word.size > 0)
        add(tables.word, 0);
    else
        good = false;
    // There are fewer tokens than 2^32, and a remainder of 64 bits would be a call.
    add(tables.position, static_cast<std::uint32_t>(token) % static_cast<std::uint32_t>(tables.length));
    add(tables.token_type, 0);
    return good;
}

template <class T, class S>
__global__ void __launch_bounds__(S::BLOCK, 1)
    embedding_layer_norm_fwd(const EmbeddingLayerNormFwd a, const Dropout dropout) {
    const int columns = static_cast<int>(a.tables.columns);
    const std::uint64_t seed = dropout.seed == nullptr ? 0 : static_cast<std::uint64_t>(*dropout.seed);
    each_row<S>(a.tables.tokens, S::ROWS, [&](std::int64_t token, bool there) {
        float x[S::VECTORS][S::VEC];
        zero<S>(x);
        const bool good = there && sum_of<T, S>(a.tables, token, x);
        const Statistics s = centre<S>(x, columns, a.eps);
        if (!there) return;
        each_vector<S>(columns, [&](int v, int column) {
            float w[S::VEC], b[S::VEC];
            load<S::VEC>(a.weight, column, w);
            load<S::VEC>(a.bias, column, b);
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) x[v][e] = x[v][e] * s.rstd * w[e] + b[e];
            if (dropout.seed != nullptr) drop<S::VEC>(dropout, seed, token, column, TAG, x[v]);
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) x[v][e] = good ? x[v][e] : NAN_;
            const std::int64_t at = token * a.tables.columns + column;
            store_any<S::VEC>(a.y, a.out_dtype, at, x[v]);
            if (a.copy != nullptr) store_any<S::VEC>(a.copy, a.copy_dtype, at, x[v]);
        });
        if (threadIdx.x % S::THREADS == 0) {
            a.mean[token] = s.mean;
            a.rstd[token] = s.rstd;
        }
    });
}

template <class T, class S>
__global__ void __launch_bounds__(S::BLOCK, 1)
    embedding_layer_norm_bwd(const EmbeddingLayerNormBwd a, const Dropout dropout) {
    const int columns = static_cast<int>(a.tables.columns);
    const std::uint64_t seed = dropout.seed == nullptr ? 0 : static_cast<std::uint64_t>(*dropout.seed);
    float dweight[S::VECTORS][S::VEC], dbias[S::VECTORS][S::VEC];
    zero<S>(dweight);
    zero<S>(dbias);
    each_row<S>(a.tables.tokens, a.each, [&](std::int64_t token, bool there) {
        float g[S::VECTORS][S::VEC], xhat[S::VECTORS][S::VEC];
        zero<S>(g);
        zero<S>(xhat);
        float rstd = 0.0f;
        if (there) {
            const bool good = sum_of<T, S>(a.tables, token, xhat);
            const float mean = a.mean[token];
            rstd = a.rstd[token];
            each_vector<S>(columns, [&](int v, int column) {
                // A token without a row adds nothing.
                if (good) {
                    load_any<S::VEC>(a.dy.data, a.dy_dtype, token * a.dy.stride + column, g[v]);
                    if (dropout.seed != nullptr) drop<S::VEC>(dropout, seed, token, column, TAG, g[v]);
                }
#pragma unroll
                for (int e = 0; e < S::VEC; ++e) {
                    xhat[v][e] = (xhat[v][e] - mean) * rstd;
                    dweight[v][e] += g[v][e] * xhat[v][e];
                    dbias[v][e] += g[v][e];
                }
            });
        }
        input_gradient<S>(g, xhat, a.weight, rstd, columns);
        if (!there) return;
        float* dx = a.dx + token * a.tables.columns;
        each_vector<S>(columns, [&](int v, int column) { store<S::VEC>(dx + column, g[v]); });
    });
    if (a.partial != nullptr) {
        store_sum<S>(a.partial, dweight, columns);
        if (S::ROWS > 1) __syncthreads();
        store_sum<S>(a.partial + a.parts * a.tables.columns, dbias, columns);
    }
}

// The table's row of the token at this place of the order; -2 before the first, -3 behind the last.
DEVICE std::int64_t sorted_row(const Scatter& a, std::int64_t at) {
    if (at < 0) return -2;
    return at < a.tokens ? row_at(a.index, a.wide, a.order[at]) : -3;
}

DEVICE bool is_row(const Scatter& a, std::int64_t row) { return row >= 0 && row < a.size && row != a.skip; }

constexpr int SCATTER_THREADS = 128;

template <class T, int VEC>
__global__ void __launch_bounds__(SCATTER_THREADS) add_runs(const Scatter a) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.y * SCATTER_THREADS + threadIdx.x) * VEC;
    if (column >= a.columns) return;
    const std::int64_t chunk = blockIdx.x, first = chunk * CHUNK;
    const std::int64_t last = first + CHUNK < a.tokens ? first + CHUNK : a.tokens;
    float* mine = a.shares + chunk * a.columns + column;
    float* behind = mine + static_cast<std::int64_t>(gridDim.x) * a.columns;
    float sum[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e] = 0.0f;
    std::int64_t row = sorted_row(a, first);
    // Whether the run that is being added up began in a chunk before.
    bool goes_on = row == sorted_row(a, first - 1);
    for (std::int64_t at = first; at < last; ++at) {
        float more[VEC];
        load<VEC>(a.dx + a.order[at] * a.columns + column, more);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[e] += more[e];
        const std::int64_t following = sorted_row(a, at + 1);
        if (following != row || at + 1 == last) {
            // The end of a run, or of what this chunk has of it.
            if (goes_on)
                store<VEC>(mine, sum);
            else if (following == row)
                store<VEC>(behind, sum);
            else if (is_row(a, row))
                store<VEC>(static_cast<T*>(a.dtable) + row * a.columns + column, sum);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum[e] = 0.0f;
            goes_on = false;
        }
        row = following;
    }
}

// The run that begins in this chunk and goes on behind it: the sum of all chunks' shares, in order.
template <class T, int VEC>
__global__ void __launch_bounds__(SCATTER_THREADS) join_runs(const Scatter a) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.y * SCATTER_THREADS + threadIdx.x) * VEC;
    if (column >= a.columns) return;
    const std::int64_t chunk = blockIdx.x, first = chunk * CHUNK, end = first + CHUNK;
    const std::int64_t row = sorted_row(a, end - 1);
    if (end >= a.tokens || row != sorted_row(a, end) || !is_row(a, row)) return;
    // A run that fills the chunk and began before belongs to where it began.
    if (sorted_row(a, first) == row && sorted_row(a, first - 1) == row) return;
    float sum[VEC];
    load<VEC>(a.shares + (gridDim.x + chunk) * a.columns + column, sum);
    std::int64_t at = chunk + 1;
    do {
        float more[VEC];
        load<VEC>(a.shares + at * a.columns + column, more);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[e] += more[e];
        ++at;
        // Goes on as long as a chunk begins with the row that the one before ends with.
    } while (at * CHUNK < a.tokens && sorted_row(a, at * CHUNK) == row);
    store<VEC>(static_cast<T*>(a.dtable) + row * a.columns + column, sum);
}

template <class T>
bool tables_aligned(const EmbeddingTables& tables) {
    constexpr int VEC = 16 / sizeof(T);
    return tables.columns % VEC == 0 && aligned(tables.word.rows, tables.token_type.rows, tables.position.rows);
}

}  // namespace

void launch_embedding_layer_norm_fwd(const EmbeddingLayerNormFwd& a, CudaStream stream) {
    with_type(a.tables.dtype, [&](auto kind) {
        using T = decltype(kind);
        const bool vectors = tables_aligned<T>(a.tables) && aligned(a.weight.data, a.bias.data, a.y, a.copy);
        with_shape<16 / sizeof(T)>(vectors, a.tables.columns, [&](auto shape) {
            using S = decltype(shape);
            launch<embedding_layer_norm_fwd<T, S>, S::SHARED>(blocks_of(a.tables.tokens, S::ROWS), S::BLOCK, stream, a,
                                                              make_dropout(a.dropout_p, a.seed));
        });
    });
}

void launch_embedding_layer_norm_bwd(const EmbeddingLayerNormBwd& a, CudaStream stream) {
    const std::int64_t columns = a.tables.columns;
    with_type(a.tables.dtype, [&](auto kind) {
        using T = decltype(kind);
        constexpr int VEC = 16 / sizeof(T);
        const bool vectors =
            tables_aligned<T>(a.tables) && rows_aligned<VEC>(a.dy) && aligned(a.weight.data, a.dx, a.partial);
        with_shape<VEC>(vectors, columns, [&](auto shape) {
            using S = decltype(shape);
            launch<embedding_layer_norm_bwd<T, S>, S::SHARED_FOR_SUMS>(blocks_of(a.tables.tokens, a.each), S::BLOCK,
                                                                       stream, a, make_dropout(a.dropout_p, a.seed));
        });
    });
    PartSums sums;
    sums.add_both(a.partial, a.parts * columns, a.dweight, a.dbias);
    launch_sum_parts(sums, a.parts, columns, stream);
}

void launch_scatter(const Scatter& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) {
        using T = decltype(kind);
        auto both = [&](auto vec) {
            constexpr int VEC = decltype(vec)::value;
            const dim3 grid(static_cast<unsigned>(ceil_div(a.tokens, CHUNK)),
                            static_cast<unsigned>(ceil_div(a.columns, SCATTER_THREADS * VEC)));
            launch<add_runs<T, VEC>, 0>(grid, SCATTER_THREADS, stream, a);
            launch<join_runs<T, VEC>, 0>(grid, SCATTER_THREADS, stream, a);
        };
        if (a.columns % 4 == 0 && aligned(a.dx, a.dtable, a.shares))
            both(std::integral_constant<int, 4>());
        else
            both(std::integral_constant<int, 1>());
    });
}

}  // namespace pyxlbert::cuda
