// What the launchers' arguments are made of; no CUDA in here, so that the binding needs none.
#pragma once
#include <cstdint>

#include "types.h"

namespace pyxlbert::cuda {

// A cudaStream_t.
using CudaStream = void*;

// [rows, N], `stride` elements from row to row.
struct Rows {
    const void* data;
    std::int64_t stride;
};

// [N] of any floating dtype; which one is asked at run time, since a row's parameters are read from the cache.
struct Parameter {
    const void* data;
    DType dtype;
};

// A parameter's gradient [N] in its own dtype.
struct Sum {
    void* data;
    DType dtype;
};

// How a kernel drops: nothing where there is no seed, which lies on the device.
struct Dropout {
    const std::int64_t* seed;
    std::uint32_t threshold;  // a word is kept when it is at least this
    float scale;              // 1 / (1 - p), 0 for p = 1
};

// A word is kept iff it is at least floor(p * 2^32); for p = 1, which does not fit 32 bits, the scale drops the rest.
inline Dropout make_dropout(double p, const std::int64_t* seed) {
    if (p == 0.0) return {nullptr, 0, 1.0f};
    if (p >= 1.0) return {seed, 0xffffffffu, 0.0f};
    return {seed, static_cast<std::uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))};
}

// The longest row that the kernels on rows take.
constexpr std::int64_t MAX_COLUMNS = 4096;

}  // namespace pyxlbert::cuda
