// Tiles of sixteen rows of 64 bytes, and their products: the only file that names the instructions.
//
// They are written out, because gcc 12's intrinsics tell the compiler too little: its _tile_loadd names no memory at
// all, so a store into what the tile reads may be moved behind it, and its _tile_loadconfig names 8 of 64 bytes, so
// the rest of the configuration may never be written.  Here a load says that it reads memory and a store that it writes
// it; no fence is needed anywhere else.
//
// With PYXLBERT_EMULATE_TILES the same functions are a model in software, for tests on machines without tiles.
#pragma once
#include "simd.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// A tile is 16 rows of 16 units of 32 bits.
constexpr std::int64_t TILE_ROWS = 16, TILE_UNITS = 16, TILE_FLOATS = TILE_ROWS * TILE_UNITS;

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL

#if defined(__AMX_BF16__) && defined(PYXLBERT_EMULATE_TILES)
#include "tile_model.h"
#else

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

#if defined(__AMX_BF16__)

// Eight full tiles for the calling thread.
PYXLBERT_INLINE void begin_tiles() {
    alignas(64) std::uint8_t configuration[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        configuration[16 + 2 * tile] = 64;
        configuration[48 + tile] = TILE_ROWS;
    }
    asm volatile("ldtilecfg %0" : : "m"(configuration));
}
PYXLBERT_INLINE void end_tiles() { asm volatile("tilerelease"); }

// Rows `stride` bytes apart.
template <int TILE>
PYXLBERT_INLINE void load_tile(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "n"(TILE) : "memory");
}
// The same for what is read once: it takes no place in the first-level cache from what is read again.
template <int TILE>
PYXLBERT_INLINE void stream_tile(const void* from, std::int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "n"(TILE) : "memory");
}
template <int TILE>
PYXLBERT_INLINE void store_tile(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "n"(TILE) : "memory");
}
template <int TILE>
PYXLBERT_INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "n"(TILE));
}

// C += A B of pairs of bfloat16: sums of 16 products of the first of each pair and of the second, their sum added to C.
template <int C, int A, int B>
PYXLBERT_INLINE void multiply_tiles_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(C), "n"(A), "n"(B));
}
// C += A B of four unsigned bytes of A and four signed bytes of B, in int32.
template <int C, int A, int B>
PYXLBERT_INLINE void multiply_tiles_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(C), "n"(A), "n"(B));
}

#else
PYXLBERT_INLINE void begin_tiles() {}
PYXLBERT_INLINE void end_tiles() {}
#endif

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL

#endif
