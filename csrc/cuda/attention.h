// attention on CUDA.
#pragma once
#include "cuda/attention_arguments.h"

namespace pyxlbert::cuda {

// out and lse of the one stream.
void launch_attention_fwd(const AttentionCall& a, CudaStream stream);

// delta, lse_correction, dquery of the one stream, dkey, dvalue, and dbias unless it is null.
void launch_attention_bwd(const AttentionCall& a, CudaStream stream);

// Whether scores need more than lengths, causality and dropout.
inline bool has_masks(const AttentionCall& a) { return a.mask.data != nullptr || a.bias.data != nullptr; }

// Whether they need more than lengths and causality.
inline bool has_extras(const AttentionCall& a) { return has_masks(a) || a.dropout.seed != nullptr; }

// The largest head size that the kernels of attention take.
constexpr int MAX_HEAD_SIZE = 128;

}  // namespace pyxlbert::cuda
