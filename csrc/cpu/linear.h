// Parameters of linear and linear_gelu for few rows on the CPU; strides count elements.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct LinearFwd {
    const void* x;                                // [M, K], rows x_stride apart
    const void* weight;                           // [N, K], contiguous
    const void* bias;                             // [N], or null
    void* y;                                      // [M, N], contiguous
    std::int64_t rows, columns, inner, x_stride;  // M, N, K
    DType dtype;                                  // of all four
    bool gelu, tanh;                              // tanh: the form of gelu
    int threads;
};

PYXLBERT_DECLARE_LEVELS(linear_fwd, LinearFwd)

}  // namespace pyxlbert
