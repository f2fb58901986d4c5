// Parameters of dropout_add_layer_norm on the CPU.  M rows of N columns; strides count elements.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct DropoutAddLayerNormFwd {
    const void* x;         // [M, N], rows x_stride apart
    const void* x_bias;    // [N], or null
    const void* residual;  // [M, N], rows residual_stride apart; its dtype is x's or float32
    const void* weight;
    const void* bias;
    const std::int64_t* seed;  // one element, or null where nothing is dropped
    void* y;                   // [M, N], contiguous, in residual's dtype
    void* y_copy;              // [M, N], contiguous, or null
    void* sum;                 // [M, N], contiguous, in residual's dtype, or null
    float* mean;               // [M], or null
    float* rstd;               // [M], or null
    std::int64_t rows, columns, x_stride, residual_stride;
    float eps;
    double dropout_p;
    DType dtype, residual_dtype, x_bias_dtype, weight_dtype, bias_dtype, copy_dtype;
    int threads;
};

struct DropoutAddLayerNormBwd {
    const void* dy;       // [M, N], rows dy_stride apart, in residual's dtype, or null
    const void* dy_copy;  // [M, N], rows dy_copy_stride apart, or null
    const void* sum;      // [M, N], contiguous
    const void* weight;
    const float* mean;
    const float* rstd;
    const std::int64_t* seed;
    void* dx;         // [M, N], contiguous, or null
    void* dresidual;  // [M, N], contiguous, or null
    void* dx_bias;    // [N] in x_bias's dtype, or null
    void* dweight;    // [N] in weight's dtype, or null
    void* dbias;      // [N] in bias's dtype, or null
    std::int64_t rows, columns, dy_stride, dy_copy_stride;
    double dropout_p;
    DType dtype, residual_dtype, x_bias_dtype, weight_dtype, bias_dtype, copy_dtype;
    int threads;
};

PYXLBERT_DECLARE_LEVELS(dropout_add_layer_norm_fwd, DropoutAddLayerNormFwd)
PYXLBERT_DECLARE_LEVELS(dropout_add_layer_norm_bwd, DropoutAddLayerNormBwd)

}  // namespace pyxlbert
