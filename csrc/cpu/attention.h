// Parameters of attention on the CPU.  Strides count elements; the last dimension of every tensor is
// contiguous.  Packed tensors are [total, H, D] and have no batch stride.
#pragma once
#include <cstdint>

#include "../score_options.h"

namespace pyxlbert {

// [B, T, H, D], or packed [total, H, D].
struct AttentionTensor {
    const void* data;
    std::int64_t batch, row, head;
};

// [B, H, Tq, Tk]; the stride of a broadcast dimension is 0, that of the keys 0 or 1.
struct ScoreTensor {
    const void* data;  // null: absent
    std::int64_t batch, head, query, key;
};

struct AttentionCall {
    AttentionTensor query, key, value;
    const std::int32_t* key_lengths;  // [B], or null: all keys
    const std::int32_t* cu_seqlens;   // [B + 1], or null: padded
    ScoreTensor mask;                 // bytes, nonzero: may attend
    ScoreTensor bias;
    std::int64_t batch, heads, queries, keys, head_size;  // packed: queries = keys = the longest sequence
    std::int64_t total;                                   // packed: number of rows
    ScoreOptions options;
    double dropout_p;
    std::int64_t seed;
    DType dtype, bias_dtype;
    int threads;
};

// Queries of one stream: rows of scores, and where their results go.
struct Stream {
    AttentionTensor query;
    std::int64_t count;  // of a sequence; packed: of the longest
    void* out;           // contiguous
    float* lse;          // [B, H, count], packed [H, total]; null: not wanted
    StreamOptions options;
    // The rest is of relative attention alone.
    const std::int32_t* positions;  // [B, count]: where each row stands, -1: nowhere; null: row i at i
    const std::int32_t* order;      // [B, count]: the rows by rising position, where there are positions
    const std::int32_t* rank;       // [B, count], packed [total], or null
    const std::int32_t* segment;    // the same
};

struct AttentionFwd {
    AttentionCall in;
    void* out;   // contiguous
    float* lse;  // [B, H, Tq], packed [H, total]; null: not wanted
};

struct AttentionBwd {
    AttentionCall in;
    AttentionTensor dout;
    const void* out;  // contiguous
    const float* lse;
    void* dquery;  // contiguous
    void* dkey;
    void* dvalue;
    void* dbias;  // contiguous in bias_shape and bias_dtype, or null: not needed
    std::int64_t bias_shape[4];
};

PYXLBERT_DECLARE_LEVELS(attention_fwd, AttentionFwd)
PYXLBERT_DECLARE_AMX(attention_fwd, AttentionFwd)
PYXLBERT_DECLARE_LEVELS(attention_bwd, AttentionBwd)
PYXLBERT_DECLARE_AMX(attention_bwd, AttentionBwd)

}  // namespace pyxlbert
