// What tells whether weights that were copied still are what they were: a digest of some of their memory.
#pragma once
#include <cstdint>

#include "../types.h"

namespace pyxlbert {

struct Fingerprint {
    const char* const* lines;  // of 64 bytes each
    std::int64_t line_count;
    const char* const* bytes;  // one each
    std::int64_t byte_count;
    std::uint64_t* digest;  // one number, the same at every level
};

PYXLBERT_DECLARE_LEVELS(fingerprint, Fingerprint)

}  // namespace pyxlbert
