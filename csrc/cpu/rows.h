// What the row kernels share: dispatch on element types, parameters widened to float once a call, and
// column sums that do not depend on the number of threads.
#pragma once
#include "../workspace.h"
#include "simd.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Calls function(T{}) with the element type that dtype names.
template <class F>
PYXLBERT_INLINE void with_type(DType dtype, F function) {
    switch (dtype) {
        case DType::float32:
            function(float{});
            break;
        case DType::bfloat16:
            function(bf16{});
            break;
        case DType::float16:
            function(f16{});
            break;
    }
}

template <class T>
PYXLBERT_INLINE void widen_row(const T* source, float* target, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + W <= n; j += W) store(target + j, load(source + j));
    if (j < n) store(target + j, load(source + j, static_cast<int>(n - j)), static_cast<int>(n - j));
}

template <class T>
PYXLBERT_INLINE void narrow_row(const float* source, T* target, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + W <= n; j += W) store(target + j, load(source + j));
    if (j < n) store(target + j, load(source + j, static_cast<int>(n - j)), static_cast<int>(n - j));
}

// A parameter vector as floats: in place when it is float32 already, else copied to scratch.
PYXLBERT_INLINE const float* as_float(const void* source, DType dtype, std::int64_t n, float* scratch) {
    if (dtype == DType::float32) return static_cast<const float*>(source);
    with_type(dtype, [&](auto type) { widen_row(static_cast<const decltype(type)*>(source), scratch, n); });
    return scratch;
}

PYXLBERT_INLINE void from_float(const float* source, void* target, DType dtype, std::int64_t n) {
    with_type(dtype, [&](auto type) { narrow_row(source, static_cast<decltype(type)*>(target), n); });
}

PYXLBERT_INLINE std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// Column sums over M rows are cut into this many blocks of rows, by M alone: a block is summed by one
// thread in row order and the blocks are added in order, so the bits do not depend on the threads.
PYXLBERT_INLINE int row_blocks(std::int64_t rows) {
    constexpr std::int64_t smallest = 16, most = 64;
    const std::int64_t blocks = (rows + smallest - 1) / smallest;
    return static_cast<int>(blocks < most ? blocks : most);
}

// First row of block b of `blocks`.
PYXLBERT_INLINE std::int64_t block_start(std::int64_t rows, int blocks, int b) {
    return rows / blocks * b + (rows % blocks < b ? rows % blocks : b);
}

// partial [blocks, stride] summed over blocks into total [n]; partial[0] receives the sum.
PYXLBERT_INLINE void add_blocks(float* partial, int blocks, std::int64_t stride, std::int64_t n) {
    for (int b = 1; b < blocks; ++b) {
        const float* block = partial + b * stride;
        for (std::int64_t j = 0; j < n; j += W) store(partial + j, load(partial + j) + load(block + j));
    }
}

// A team is worth waking only for enough elements; below, waking costs more than the work.
PYXLBERT_INLINE int team(int threads, std::int64_t elements) {
    constexpr std::int64_t worth_a_thread = 16384;
    const std::int64_t wanted = elements / worth_a_thread;
    return wanted < 1 ? 1 : wanted < threads ? static_cast<int>(wanted) : threads;
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
