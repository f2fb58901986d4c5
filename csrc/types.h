// Element types and the level names shared by every native file.  No library code in here: files of
// csrc/cpu are compiled once per instruction set, and an inline function that the linker keeps from
// the AVX-512 copy would then run on every machine.
#pragma once
#include <cstdint>

namespace pyxlbert {

struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

// Element type of a tensor as Python passes it; the order is pyxlbert.cpu's.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// What tells one op's dropout bits from another's, the last counter word of Philox; the table of
// pyxlbert.reference.philox.Tag.
enum class Tag : std::uint32_t {
    attention = 1,
    relative_attention = 2,
    query_stream = 3,
    dropout_add_layer_norm = 4,
    embedding_layer_norm = 5,
    dropout = 6,
};

}  // namespace pyxlbert

// Declares `void function(const Args&)` in the namespace of every instruction-set level.
#if defined(__x86_64__)
#define PYXLBERT_DECLARE_LEVELS(function, Args) \
    namespace portable {                        \
    void function(const Args&);                 \
    }                                           \
    namespace avx2 {                            \
    void function(const Args&);                 \
    }                                           \
    namespace avx512 {                          \
    void function(const Args&);                 \
    }                                           \
    namespace avx512_bf16 {                     \
    void function(const Args&);                 \
    }
#else
#define PYXLBERT_DECLARE_LEVELS(function, Args) \
    namespace portable {                        \
    void function(const Args&);                 \
    }
#endif

// The same for a function that also has a version for the bfloat16 tiles of the fifth level; where it has none,
// that level runs the version of another.
#if defined(__x86_64__)
#define PYXLBERT_DECLARE_AMX(function, Args) \
    namespace amx {                          \
    void function(const Args&);              \
    }
#else
#define PYXLBERT_DECLARE_AMX(function, Args)
#endif

#define PYXLBERT_INLINE inline __attribute__((always_inline))
// The same for a lambda, between its parameters and its body.
#define PYXLBERT_LAMBDA __attribute__((always_inline))
