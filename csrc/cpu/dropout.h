// Parameters of dropout where nothing can be fused with it.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct DropoutFlat {
    const void* x;  // [n], contiguous
    void* y;        // [n], contiguous
    std::int64_t n, seed;
    // Element e takes 16 bits, half e % 2 of word e / 2 % 64 of the words that row e / 128 has; it is kept if they are
    // not below the limit.
    std::uint32_t limit;  // 1 to 2^16 - 1
    DType dtype;
    int threads;
};

PYXLBERT_DECLARE_LEVELS(dropout, DropoutFlat)

}  // namespace pyxlbert
