// Parameters of bias_gelu on the CPU.  M rows of N columns; strides count elements.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct BiasGeluFwd {
    const void* x;     // [M, N], rows x_stride apart
    const void* bias;  // [N], or null
    void* y;           // [M, N], contiguous
    std::int64_t rows, columns, x_stride;
    DType dtype, bias_dtype;
    bool tanh;
    int threads;
};

struct BiasGeluBwd {
    const void* dy;    // [M, N], rows dy_stride apart
    const void* x;     // [M, N], rows x_stride apart
    const void* bias;  // [N], or null
    void* dx;          // [M, N], contiguous
    void* dbias;       // [N] in bias's dtype, or null
    std::int64_t rows, columns, dy_stride, x_stride;
    DType dtype, bias_dtype;
    bool tanh;
    int threads;
};

PYXLBERT_DECLARE_LEVELS(bias_gelu_fwd, BiasGeluFwd)
PYXLBERT_DECLARE_LEVELS(bias_gelu_bwd, BiasGeluBwd)

}  // namespace pyxlbert
