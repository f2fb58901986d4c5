// dropout_add_layer_norm on CUDA.  Addresses are of device memory; statistics and partial sums are float32.
#pragma once
#include "cuda/arguments.h"

namespace pyxlbert::cuda {

struct DropoutAddLayerNormFwd {
    Rows x, residual;
    Parameter x_bias;  // data null: none
    Parameter weight, bias;
    void* y;                   // [rows, columns], in residual's dtype
    void* copy;                // y in `copy_dtype`, or null
    void* s;                   // what is normalised, in residual's dtype, or null: nothing is saved
    float *mean, *rstd;        // [rows], of s as it is stored; null with it
    const std::int64_t* seed;  // on the device
    double dropout_p;
    std::int64_t rows, columns;
    float eps;
    DType dtype, residual_dtype, copy_dtype;  // x's, float32 or x's, any
};
void launch_dropout_add_layer_norm_fwd(const DropoutAddLayerNormFwd& a, CudaStream stream);

struct DropoutAddLayerNormBwd {
    Rows dy, dy_copy;  // in residual's dtype and in `copy_dtype`; data null: nothing came
    const void* s;
    Parameter weight;
    const float *mean, *rstd;
    void *dx, *dresidual;  // in x's and residual's dtype, or null
    float* partial;        // [2, parts, columns], or null
    float* partial_bias;   // [parts, columns], or null
    Sum dweight, dbias, dx_bias;
    const std::int64_t* seed;
    double dropout_p;
    std::int64_t rows, columns, parts, each;  // each: rows of a part, a multiple of 4
    DType dtype, residual_dtype, copy_dtype;
};
void launch_dropout_add_layer_norm_bwd(const DropoutAddLayerNormBwd& a, CudaStream stream);

}  // namespace pyxlbert::cuda
