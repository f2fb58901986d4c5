// Parameters of the gradient of cross entropy, which takes the place of its logits.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct SoftmaxSlope {
    bf16* logits;                // [C, V], contiguous; becomes scale * (softmax - one-hot)
    const std::int64_t* labels;  // [C], 0 to V - 1
    float* found;  // [C, 3]: of a row its largest logit, the sum of e^(logit - that), and its label's logit
    std::int64_t rows, columns;  // C, V
    float scale;
    int threads;
};

#if defined(__x86_64__)
// Beside the products of product.h.
namespace avx512_bf16 {
void softmax_slope(const SoftmaxSlope&);
}
#endif

}  // namespace pyxlbert
