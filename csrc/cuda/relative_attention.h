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

}  // namespace pyxlbert::cuda
