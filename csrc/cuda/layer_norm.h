// layer_norm on CUDA.  Addresses are of device memory; statistics and partial sums are float32.
#pragma once
#include "cuda/arguments.h"

namespace pyxlbert::cuda {

struct LayerNormFwd {
    Rows x;
    Parameter weight, bias;
    void* y;             // [rows, columns], in x's dtype
    float *mean, *rstd;  // [rows], or null
    std::int64_t rows, columns;
    float eps;
    DType dtype;
};
void launch_layer_norm_fwd(const LayerNormFwd& a, CudaStream stream);

struct LayerNormBwd {
    Rows dy, x;
    Parameter weight;
    const float *mean, *rstd;
    void* dx;        // [rows, columns], in x's dtype
    float* partial;  // [2, parts, columns], or null: no parameter's gradient is wanted
    Sum dweight, dbias;
    std::int64_t rows, columns, parts, each;  // each: rows of a part, a multiple of 4
    DType dtype;
};
void launch_layer_norm_bwd(const LayerNormBwd& a, CudaStream stream);

}  // namespace pyxlbert::cuda
