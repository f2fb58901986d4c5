// Kernels of attention by element type and head size.
//
// Files that hold such kernels are compiled once for each element type, PYXLBERT_ELEMENT, so that compilers share the
// work; dispatch.cu chooses among them.  Head sizes are padded to the next that kernels are compiled for.
#pragma once
#include "cuda/attention_arguments.h"
#include "cuda/device.cuh"

namespace pyxlbert::cuda {

template <class T>
struct Kernels {
    static void attention_fwd(const AttentionCall& a, CudaStream stream);
    // False where the call or the device is not for it, and nothing has been started.
    static bool attention_fwd_hopper(const AttentionCall& a, CudaStream stream);
    // out and lse from what the parts of the keys have found.
    static void attention_fwd_join(const AttentionCall& a, CudaStream stream);
    static void attention_bwd(const AttentionCall& a, CudaStream stream);
    static void relative_attention_fwd(const AttentionCall& a, CudaStream stream);
    static bool relative_attention_fwd_hopper(const AttentionCall& a, CudaStream stream);
    static void relative_attention_bwd(const AttentionCall& a, CudaStream stream);
    static void two_stream_attention_fwd(const AttentionCall& a, CudaStream stream);
};

// Calls f(integral_constant<D>) with the padded head size; PLAIN: also with those that BERT's smaller relatives have.
template <bool PLAIN, class F>
void with_head_size(int head_size, F f) {
    // Where time to compile counts, few sizes stand for all: the code is the same.
#ifndef PYXLBERT_FEW_SIZES
    if constexpr (PLAIN)
        if (head_size <= 32) return f(std::integral_constant<int, 32>());
#endif
    if (head_size <= 64) return f(std::integral_constant<int, 64>());
#ifndef PYXLBERT_ONE_SIZE
#ifndef PYXLBERT_FEW_SIZES
    if constexpr (PLAIN)
        if (head_size <= 96) return f(std::integral_constant<int, 96>());
#endif
    return f(std::integral_constant<int, 128>());
#endif
}

}  // namespace pyxlbert::cuda
