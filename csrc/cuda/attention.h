// attention on CUDA.
#pragma once
#include "cuda/attention_arguments.h"

namespace pyxlbert::cuda {

// out and lse of the one stream.
void launch_attention_fwd(const AttentionCall& a, CudaStream stream);

// delta, lse_correction, dquery of the one stream, dkey, dvalue, and dbias unless it is null.
void launch_attention_bwd(const AttentionCall& a, CudaStream stream);

// The largest head size that the kernels of attention take.
constexpr int MAX_HEAD_SIZE = 128;

}  // namespace pyxlbert::cuda
