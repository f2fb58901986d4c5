// Parameters of embedding_layer_norm on the CPU.  M tokens, N columns; every table contiguous.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

// One look-up table and the row that each token takes of it.
struct EmbeddingTable {
    const void* rows;           // [entries, N], or null: the table is absent
    const std::int64_t* index;  // [M], or null: token i takes row i % period
    std::int64_t period;
};

struct EmbeddingLayerNormFwd {
    EmbeddingTable word, position, token_type;
    const void* weight;
    const void* bias;
    void* y;       // [M, N]
    void* y_copy;  // [M, N], or null
    float* mean;   // [M]
    float* rstd;   // [M]
    std::int64_t rows, columns;
    float eps;
    double dropout_p;
    std::int64_t seed;
    DType table_dtype, weight_dtype, bias_dtype, out_dtype, copy_dtype;
    int threads;
};

struct EmbeddingLayerNormBwd {
    const void* dy;  // [M, N], rows dy_stride apart
    std::int64_t dy_stride;
    EmbeddingTable word, position, token_type;
    const void* weight;
    const float* mean;
    const float* rstd;
    float* dx;      // [M, N]: the gradient of the summed embeddings
    void* dweight;  // [N] in weight's dtype, or null
    void* dbias;    // [N] in bias's dtype, or null
    std::int64_t rows, columns;
    double dropout_p;
    std::int64_t seed;
    DType table_dtype, weight_dtype, bias_dtype, dy_dtype;
    int threads;
};

// dtable[index[i]] += dx[i] for every token i, tokens of one row added in their order.
struct EmbeddingScatter {
    const float* dx;            // [M, N]
    const std::int64_t* index;  // [M]
    const std::int64_t* order;  // [M], tokens sorted by index, stable
    void* dtable;               // [entries, N], zero on entry
    std::int64_t rows, columns;
    std::int64_t skip;  // the table row that gets no gradient, or -1
    DType table_dtype;
    int threads;
};

PYXLBERT_DECLARE_LEVELS(embedding_layer_norm_fwd, EmbeddingLayerNormFwd)
PYXLBERT_DECLARE_LEVELS(embedding_layer_norm_bwd, EmbeddingLayerNormBwd)
PYXLBERT_DECLARE_LEVELS(embedding_scatter, EmbeddingScatter)

}  // namespace pyxlbert
