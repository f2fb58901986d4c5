// Parameters of the products of training in bfloat16, whose operands are packed on the way; strides count elements.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

// c = a b + bias, or c += a b: [M, K] times [K, N].
struct Product {
    const bf16* a;
    std::int64_t a_stride;  // between rows of M, or where a lies transposed between rows of K
    bool transposed;        // a[k * a_stride + m]; c is then float32
    const void* b;
    std::int64_t b_inner_stride, b_column_stride;  // between neighbours along K and along N; one of them is 1
    DType b_dtype;                                 // float32 is rounded, or bfloat16
    void* c;                                       // rows c_stride apart
    std::int64_t c_stride;
    DType c_dtype;                      // float32 or bfloat16
    bool add;                           // c += a b; c is then float32
    const float* bias;                  // [N], or null
    std::int64_t rows, columns, inner;  // M, N, K; none is 0
    int threads;
};

#if defined(__x86_64__)
// At this level alone: below it there is nothing that multiplies bfloat16, and tiles are oneDNN's in training.
namespace avx512_bf16 {
void product(const Product&);
}
#endif

}  // namespace pyxlbert
