// Parameters of relative_attention and two_stream_attention on the CPU: those of attention, and what
// Transformer-XL's score has beside q k^T.
#pragma once
#include "attention.h"

namespace pyxlbert {

struct RelativeCall {
    AttentionCall in;       // no bias; query and queries are the content stream's
    AttentionTensor table;  // [G, R, H, D]: `batch` is the stride between tables
    std::int64_t tables, table_rows;
    std::int64_t offset;               // query at p meets key j at table row offset + j - p
    const float* content_bias;         // [H, D], or null; the same for the next two
    const float* position_bias;        // [H, D]
    const float* segment_bias;         // [H, D]
    const float* segment_embedding;    // [2, H, D]: of the same segment, of another; or null
    const std::int32_t* key_rank;      // [B, Tk], packed [total], or null
    const std::int32_t* key_segments;  // the same
    RelativeOptions options;
};

struct RelativeAttentionFwd {
    RelativeCall in;
    Stream streams[2];  // content and query stream; a stream that is absent has no rows
};

struct RelativeAttentionBwd {
    RelativeCall in;
    Stream streams[2];  // out and lse are forward's; a stream without a gradient has no rows
    AttentionTensor dout[2];
    void* dquery[2];  // contiguous; rows that stand nowhere are left as they are
    void* dkey;       // contiguous
    void* dvalue;
    // In float, contiguous; null: not needed.
    float* dtable;              // [G, R, H, D]
    float* dcontent_bias;       // [H, D]
    float* dposition_bias;      // [H, D]
    float* dsegment_bias;       // [H, D]
    float* dsegment_embedding;  // [2, H, D]
};

PYXLBERT_DECLARE_LEVELS(relative_attention_fwd, RelativeAttentionFwd)
PYXLBERT_DECLARE_AMX(relative_attention_fwd, RelativeAttentionFwd)
PYXLBERT_DECLARE_LEVELS(relative_attention_bwd, RelativeAttentionBwd)
PYXLBERT_DECLARE_AMX(relative_attention_bwd, RelativeAttentionBwd)

}  // namespace pyxlbert
