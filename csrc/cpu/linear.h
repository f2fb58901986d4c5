// Parameters of linear and linear_gelu for few rows on the CPU; strides count elements.
#pragma once
#include <cstdint>

#include "../types.h"
#include "packed_matrix.h"

namespace pyxlbert {

// What follows a product; the order is pyxlbert.cpu's.
enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4 };

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

// A linear layer whose weight is packed.
struct PackedLinear {
    PackedMatrix weight;
    const float* bias;  // [N], then zeros to the end of the last panel, which is at most 64 columns wide
};

struct PackedLinearFwd {
    const PackedLinear* layer;
    const void* x;  // [M, K], rows x_stride apart
    void* y;        // [M, N], contiguous
    std::int64_t rows, x_stride;
    DType dtype;  // of x, y and the weight before it was packed
    Activation activation;
    int threads;
};

PYXLBERT_DECLARE_LEVELS(linear_fwd, LinearFwd)
PYXLBERT_DECLARE_LEVELS(packed_linear_fwd, PackedLinearFwd)
PYXLBERT_DECLARE_VNNI(packed_linear_fwd, PackedLinearFwd)
PYXLBERT_DECLARE_AMX(packed_linear_fwd, PackedLinearFwd)

}  // namespace pyxlbert
