// relative_attention on CUDA.
#pragma once
#include "cuda/attention_arguments.h"

namespace pyxlbert::cuda {

// out and lse of the one stream; rows of a stream with positions that are at none are left alone.
void launch_relative_attention_fwd(const AttentionCall& a, CudaStream stream);

// Of one stream or two: delta, lse_correction, content, position, dquery and parts of each; dkey, dvalue and dtable of
// both.
void launch_relative_attention_bwd(const AttentionCall& a, CudaStream stream);

// How many windows of queries `parts` has for so many positions: the rows of a stream without positions of its own,
// else offset + 1; on a device with so many bytes of shared memory for a block.
std::int64_t windows_of_parts(DType dtype, int head_size, std::int64_t positions, std::size_t shared);

// Whether scores need more than lengths, causality, segments and dropout.
inline bool has_relative_masks(const AttentionCall& a) {
    bool masks = a.mask.data != nullptr || a.key_rank != nullptr || a.relative.uniform_rows;
    for (int n = 0; n < a.streams; ++n) masks = masks || a.stream[n].options.see_self;
    return masks;
}

// Whether they need more than lengths and causality.
inline bool has_relative_extras(const AttentionCall& a) {
    return a.key_segments != nullptr || a.dropout.seed != nullptr || has_relative_masks(a);
}

}  // namespace pyxlbert::cuda
