// Sums of many terms whose error does not grow with their number; csrc/cpu/sums.h for the GPU.
//
// Source: Kahan, "Further remarks on reducing truncation errors", Communications of the ACM 8 (1965), page 40.
#pragma once
#include "cuda/device.cuh"

namespace pyxlbert::cuda {

// total += x; `lost` is what the total is too large by.
DEVICE void add_exactly(float& total, float& lost, float x) {
    const float wanted = __fsub_rn(x, lost), sum = __fadd_rn(total, wanted);
    const float excess = __fsub_rn(__fsub_rn(sum, total), wanted);
    // Infinite sums have lost nothing that could be given back.
    lost = fabsf(excess) < INFINITY_ ? excess : 0.0f;
    total = sum;
}

}  // namespace pyxlbert::cuda
