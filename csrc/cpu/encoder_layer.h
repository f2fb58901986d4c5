// Parameters of encoder_layer on the CPU: a stack of layers, each attention and a feed-forward network with LayerNorm
// after either residual sum.
#pragma once
#include "linear.h"
#include "relative_attention.h"

namespace pyxlbert {

struct NormParameters {
    const float *weight, *bias;  // [E]
    float eps;
};

struct EncoderLayer {
    // Query, key and value, one below the other, [3 H D, E]: as one weight, or query alone before the other two.
    PackedLinear projections[2];
    int projection_count;
    PackedLinear out;   // [E, H D]
    PackedLinear up;    // [F, E]
    PackedLinear down;  // [E, F]
    NormParameters attention_norm, norm;
    Activation activation;
    // Of relative attention; `position` [H D, E] has no columns where there is none.
    PackedLinear position;
    const float *content_bias, *position_bias, *segment_bias, *segment_embedding;  // see RelativeCall
};

struct EncoderLayersFwd {
    const EncoderLayer* layers;
    int count;
    const void* x;         // [M, E] in dtype, contiguous
    const void* residual;  // [M, E] in stream_dtype, contiguous
    void* y;               // [M, E] in dtype
    void* y_stream;        // [M, E] in stream_dtype, or null: y is both
    std::int64_t rows, hidden;
    DType dtype, stream_dtype;
    // Where the rows lie and what masks them; query, key, value and dtype are the layers' own.
    AttentionCall attention;
    // Of relative attention: [tables R, E] in dtype, and the inputs whose `in` and table are the layers' own.
    const void* positions;
    RelativeCall relative;
    Stream relative_stream;
    // Of each layer what `distance_table` makes of the positions; or null: it is made here.
    const void* const* tables;
};

// The product of embeddings of distances with one layer's projection of them.
struct DistanceTable {
    const EncoderLayer* layer;
    const void* embeddings;  // [R, E] in dtype, contiguous
    std::int64_t rows, hidden;
    DType dtype;
    int threads;
    // [R, H D], contiguous, in the element that the level stores, at most a float; or null: only its size is wanted.
    void* table;
    std::int64_t* row_bytes;  // receives the size of a row of the table
};

PYXLBERT_DECLARE_LEVELS(encoder_layers_fwd, EncoderLayersFwd)
PYXLBERT_DECLARE_LEVELS(distance_table, DistanceTable)
PYXLBERT_DECLARE_VNNI(encoder_layers_fwd, EncoderLayersFwd)
PYXLBERT_DECLARE_VNNI(distance_table, DistanceTable)
PYXLBERT_VNNI_TAKES(attention_fwd)
PYXLBERT_VNNI_TAKES(relative_attention_fwd)
PYXLBERT_DECLARE_AMX(encoder_layers_fwd, EncoderLayersFwd)
PYXLBERT_DECLARE_AMX(distance_table, DistanceTable)

}  // namespace pyxlbert
