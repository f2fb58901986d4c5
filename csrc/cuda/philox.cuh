// Dropout bits: Philox 4x32-10; pyxlbert/reference/philox.py is the readable definition.
#pragma once
#include "cuda/device.cuh"

namespace pyxlbert::cuda {

struct Words {
    std::uint32_t word[4];
};

// The words of counter (block, row, plane, tag).
DEVICE Words philox(std::uint64_t seed, std::uint32_t block, std::uint32_t row, std::uint32_t plane, Tag tag) {
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    std::uint32_t c0 = block, c1 = row, c2 = plane, c3 = static_cast<std::uint32_t>(tag);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = static_cast<std::uint64_t>(c0) * 0xd2511f53u;
        const std::uint64_t p1 = static_cast<std::uint64_t>(c2) * 0xcd9e8d57u;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(p1);
        c3 = static_cast<std::uint32_t>(p0);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// Drops neighbours x of one row from `column` on, a multiple of VEC; counters (column / 4, row, row >> 32, tag).
template <int VEC>
DEVICE void drop(const Dropout& dropout, std::uint64_t seed, std::int64_t row, int column, Tag tag, float (&x)[VEC]) {
    const std::uint32_t low = static_cast<std::uint32_t>(row), high = static_cast<std::uint32_t>(row >> 32);
    if constexpr (VEC == 1) {
        const Words words = philox(seed, column / 4, low, high, tag);
        std::uint32_t word = words.word[0];
#pragma unroll
        for (int k = 1; k < 4; ++k) word = column % 4 == k ? words.word[k] : word;
        x[0] = word >= dropout.threshold ? x[0] * dropout.scale : 0.0f;
    } else {
#pragma unroll
        for (int first = 0; first < VEC; first += 4) {
            const Words words = philox(seed, (column + first) / 4, low, high, tag);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                x[first + k] = words.word[k] >= dropout.threshold ? x[first + k] * dropout.scale : 0.0f;
        }
    }
}

}  // namespace pyxlbert::cuda
