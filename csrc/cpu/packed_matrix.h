// A weight of a linear layer in the order in which a level multiplies, made once for many products.
#pragma once
#include <cstdint>

#include "../types.h"

// Declares a function that has a version of its own at level avx2_vnni, which differs from avx2 in its products of
// bytes alone; and one that these take from avx2.
#if defined(__x86_64__)
#define PYXLBERT_DECLARE_VNNI(function, Args) \
    namespace avx2_vnni {                     \
    void function(const Args&);               \
    }
#define PYXLBERT_VNNI_TAKES(function) \
    namespace avx2_vnni {             \
    using avx2::function;             \
    }
#else
#define PYXLBERT_DECLARE_VNNI(function, Args)
#define PYXLBERT_VNNI_TAKES(function)
#endif

namespace pyxlbert {

// One source of a packed weight: rows of the weight are columns of the product.
struct WeightRows {
    const void* data;  // [rows, K], of the matrix's dtype, or where it is quantised int8
    std::int64_t rows, row_stride, inner_stride;
};

struct PackedMatrix {
    void* data;                   // null: only `bytes` is wanted
    std::int64_t columns, inner;  // N, K
    DType dtype;                  // of the weight before it is packed
    // Of eight-bit integers: column n of the weight is about scales[n] times integers of at most 127, whose sum times
    // scales[n] is sums[n], which is filled in; both have zeros to the end of the last panel.
    bool quantised;
    const float* scales;
    float* sums;
    std::int64_t bytes;  // of `data`; the level that packs fills it in
};

struct PackMatrix {
    PackedMatrix* matrix;
    const WeightRows* parts;  // one below the other; their rows add up to `columns`
    int count;
};

PYXLBERT_DECLARE_LEVELS(pack_matrix, PackMatrix)
PYXLBERT_DECLARE_VNNI(pack_matrix, PackMatrix)
PYXLBERT_DECLARE_AMX(pack_matrix, PackMatrix)

}  // namespace pyxlbert
