// Parameters of layer_norm on the CPU.  M rows of N columns; strides count elements.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct LayerNormFwd {
    const void* x;  // [M, N], rows x_stride apart
    const void* weight;
    const void* bias;
    void* y;      // [M, N], contiguous
    float* mean;  // [M], or null: nothing is saved
    float* rstd;  // [M], or null
    std::int64_t rows, columns, x_stride;
    float eps;
    DType dtype, weight_dtype, bias_dtype;
    int threads;
};

struct LayerNormBwd {
    const void* dy;  // [M, N], rows dy_stride apart
    const void* x;
    const void* weight;
    const float* mean;
    const float* rstd;
    void* dx;       // [M, N], contiguous
    void* dweight;  // [N] in weight's dtype, or null
    void* dbias;    // [N] in bias's dtype, or null
    std::int64_t rows, columns, dy_stride, x_stride;
    DType dtype, weight_dtype, bias_dtype;
    int threads;
};

PYXLBERT_DECLARE_LEVELS(layer_norm_fwd, LayerNormFwd)
PYXLBERT_DECLARE_LEVELS(layer_norm_bwd, LayerNormBwd)

}  // namespace pyxlbert
