// bias_gelu on CUDA.  Addresses are of device memory.
#pragma once
#include "cuda/arguments.h"

namespace pyxlbert::cuda {

struct BiasGeluFwd {
    Rows x;
    Parameter bias;  // data null: none
    void* y;         // [rows, columns], in x's dtype
    std::int64_t rows, columns;
    bool tanh;
    DType dtype;
};
void launch_bias_gelu_fwd(const BiasGeluFwd& a, CudaStream stream);

struct BiasGeluBwd {
    Rows dy, x;
    Parameter bias;
    void* dx;        // [rows, columns], in x's dtype
    float* partial;  // [parts, columns], or null: bias's gradient is not wanted
    Sum dbias;
    std::int64_t rows, columns, parts, each;  // each: rows of a part
    bool tanh;
    DType dtype;
};
void launch_bias_gelu_bwd(const BiasGeluBwd& a, CudaStream stream);

}  // namespace pyxlbert::cuda
