// two_stream_attention on CUDA; its backward is launch_relative_attention_bwd with two streams.
#pragma once
#include "cuda/attention_arguments.h"

namespace pyxlbert::cuda {

// out and lse of both streams, content first; rows of a stream with positions that are at none are left alone.
void launch_two_stream_attention_fwd(const AttentionCall& a, CudaStream stream);

}  // namespace pyxlbert::cuda
