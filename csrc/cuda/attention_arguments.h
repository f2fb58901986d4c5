// The arguments of all attention kernels, forward and backward; no CUDA in here.
#pragma once
#include "cuda/arguments.h"
#include "score_options.h"

namespace pyxlbert::cuda {

// [B, T, H, D], or packed [total, H, D] with a batch stride of 0; the last dimension is contiguous, rows begin at
// multiples of 16 bytes.
struct Heads {
    const void* data;
    std::int64_t batch, row, head;
};

// What broadcasts to [B, H, Tq, Tk]; a stride is 0 along what is broadcast.
struct Scores {
    const void* data;
    std::int64_t batch, head, query, key;
};

// The queries of one stream and what comes of them.
struct Stream {
    Heads query;
    int rows;  // of a sequence; packed: at most
    // int32 [B, rows]: positions in order, at most `offset`, and the numbers of their rows; null: row i is at position
    // i.  Rows of position -1 are left alone.
    const std::int32_t *positions, *numbers;
    // int32 [B, rows] or packed, by number; or null.
    const std::int32_t *rank, *segments;
    StreamOptions options;
    void* out;   // like the query, contiguous
    float* lse;  // [B, H, rows], packed [H, total]
    // Backward.
    Heads dout;
    float* delta;              // like lse: the sum of dout * out
    float* lse_correction;     // like lse: what it is short of the logarithm of the weights' sum
    void* dquery;              // like the query, contiguous; null: nobody needs it, and parts is null too
    void *content, *position;  // relative_attention: the query with either bias, like the query, contiguous
    float* parts;              // [B * H, windows, 5, D], or null: sums over queries for the biases' gradients
};

struct AttentionCall {
    Heads key, value;
    const std::int32_t *key_lengths, *cu_seqlens;
    Scores mask;  // bytes
    Scores bias;
    DType bias_dtype;
    int batch, heads, queries, keys;  // of a sequence; packed: at most
    int head_size;
    std::int64_t total;  // packed rows, or 0
    ScoreOptions options;
    Dropout dropout;
    DType dtype;
    // relative_attention: the table [tables, table_rows, H, D], each for ceil(B / tables) sequences; the others [H, D]
    // and, the last, [2, H, D].
    Heads table;
    int tables, table_rows, offset;
    Parameter content_bias, position_bias, segment_bias, segment_embedding;
    const std::int32_t *key_rank, *key_segments;  // [B, Tk] or packed, or null
    RelativeOptions relative;
    int streams;
    Stream stream[2];
    // Forward: what the parts of the keys have found, see attention_parts.cuh; null: keys are not split.
    float* partial;
    // Backward.
    void *dkey, *dvalue;  // contiguous; both null: nobody needs them
    float* dtable;        // [tables, table_rows, H, D], or null
    void* dbias;          // in bias's dtype, contiguous, or null
    std::int64_t dbias_shape[4];
};

// Where keys are split: for so few queries, from so many keys on, into parts of so many.  All tiles divide a part.
constexpr int FEW_QUERIES = 64, MANY_KEYS = 1024, KEYS_OF_PART = 512;

// A call with one of its streams alone.
inline AttentionCall alone(const AttentionCall& a, int stream) {
    AttentionCall one = a;
    one.streams = 1;
    one.stream[0] = a.stream[stream];
    return one;
}

// Calls f with each stream that has rows alone.
template <class F>
void for_each_stream(const AttentionCall& a, F f) {
    for (int n = 0; n < a.streams; ++n)
        if (a.stream[n].rows > 0) f(alone(a, n));
}

}  // namespace pyxlbert::cuda
