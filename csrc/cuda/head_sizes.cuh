// Which head sizes kernels of attention are compiled for; others are padded to the next within a tile.
#pragma once
#include "cuda/attention_arguments.h"
#include "cuda/device.cuh"

namespace pyxlbert::cuda {

// Calls f(T(), integral_constant<D>) with the element type and the padded head size.
template <class F>
void with_head_size(const Attention& a, F f) {
    auto sizes = [&](auto kind) {
    // Where time to compile counts, one size stands for several: the code is the same.
#ifndef PYXLBERT_FEW_SIZES
        if (a.head_size <= 32) return f(kind, std::integral_constant<int, 32>());
#endif
        if (a.head_size <= 64) return f(kind, std::integral_constant<int, 64>());
#ifndef PYXLBERT_FEW_SIZES
        if (a.head_size <= 96) return f(kind, std::integral_constant<int, 96>());
#endif
        return f(kind, std::integral_constant<int, 128>());
    };
    if (a.dtype == DType::float32)
        sizes(float());
    else if (a.dtype == DType::bfloat16)
        sizes(bfloat16());
    else
        sizes(float16());
}

}  // namespace pyxlbert::cuda
