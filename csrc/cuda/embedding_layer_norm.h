// embedding_layer_norm on CUDA.  Addresses are of device memory; statistics and partial sums are float32.
#pragma once
#include "cuda/arguments.h"

namespace pyxlbert::cuda {

// A table [size, columns] in the tables' dtype, and for each token the row it takes, int32 or int64.
struct Table {
    const void* rows;  // null: there is no such table
    std::int64_t size;
    const void* index;  // [tokens], or null
    bool wide;          // the index is int64
};

struct EmbeddingTables {
    Table word;
    Table token_type;  // without an index row 0
    Table position;    // without an index a token's number in its sequence of `length`
    std::int64_t length;
    std::int64_t tokens, columns;
    DType dtype;
};

struct EmbeddingLayerNormFwd {
    EmbeddingTables tables;
    Parameter weight, bias;
    void* y;     // [tokens, columns], in `out_dtype`
    void* copy;  // y in `copy_dtype`, or null
    float *mean, *rstd;
    const std::int64_t* seed;
    double dropout_p;
    float eps;
    DType out_dtype, copy_dtype;
};
void launch_embedding_layer_norm_fwd(const EmbeddingLayerNormFwd& a, CudaStream stream);

struct EmbeddingLayerNormBwd {
    EmbeddingTables tables;
    Rows dy;  // in `dy_dtype`
    Parameter weight;
    const float *mean, *rstd;
    float* dx;       // [tokens, columns]: of the sum that is normalised
    float* partial;  // [2, parts, columns], or null
    Sum dweight, dbias;
    const std::int64_t* seed;
    double dropout_p;
    std::int64_t parts, each;  // each: tokens of a part, a multiple of 4
    DType dy_dtype;
};
void launch_embedding_layer_norm_bwd(const EmbeddingLayerNormBwd& a, CudaStream stream);

// Tokens that a block of the scatter adds up.
constexpr std::int64_t CHUNK = 64;

// table[index[t]] += dx[t] for all tokens, those of a row in the order that `order` sorts them to.
struct Scatter {
    const float* dx;    // [tokens, columns]
    const void* index;  // [tokens], int32 or int64
    bool wide;
    const std::int64_t* order;  // [tokens]: a stable argsort of index
    void* dtable;               // [size, columns] in `dtype`, zeros
    float* shares;              // [2, ceil(tokens / CHUNK), columns]
    std::int64_t tokens, columns, size;
    std::int64_t skip;  // a row that gets nothing, or -1
    DType dtype;
};
void launch_scatter(const Scatter& a, CudaStream stream);

}  // namespace pyxlbert::cuda
