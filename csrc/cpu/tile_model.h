// The functions of tiles.h in software, for the tests alone: level amx on any machine with AVX-512 and its bfloat16.
//
// Sums and roundings are those of the processor's manual (TDPBF16PS: every product is fused into the sum, subnormal
// numbers are zero on the way in and out).  Stricter than the processor: tiles that were never written hold NaN, and
// instructions outside begin_tiles and end_tiles end the process.
#pragma once
#include "simd.h"

namespace pyxlbert {

// A fault of the model, planted by the tests: 0 none, 1 clearing a tile leaves it as it is, 2 every fifth product is
// left out, 3 a load leaves the tile's last row as it is.
extern int tile_fault;

namespace PYXLBERT_LEVEL {
namespace {

struct Tiles {
    alignas(64) unsigned char bytes[8][TILE_ROWS][64];
    bool ready;
    std::uint64_t products;

    unsigned char (&of(int tile)) [TILE_ROWS][64] {
        if (!ready) __builtin_trap();
        return bytes[tile];
    }
};
thread_local Tiles tiles;

PYXLBERT_INLINE void begin_tiles() {
    tiles.ready = true;
    __builtin_memset(tiles.bytes, 0xff, sizeof tiles.bytes);
}
PYXLBERT_INLINE void end_tiles() { tiles.ready = false; }

// Not in line: kernels compile in half the time.
[[maybe_unused]] __attribute__((noinline)) void model_load(int tile, const void* from, std::int64_t stride) {
    auto& to = tiles.of(tile);
    for (int r = 0; r < TILE_ROWS - (tile_fault == 3); ++r)
        __builtin_memcpy(to[r], static_cast<const char*>(from) + r * stride, 64);
}
[[maybe_unused]] __attribute__((noinline)) void model_store(int tile, void* to, std::int64_t stride) {
    const auto& from = tiles.of(tile);
    for (int r = 0; r < TILE_ROWS; ++r) __builtin_memcpy(static_cast<char*>(to) + r * stride, from[r], 64);
}
[[maybe_unused]] __attribute__((noinline)) void model_clear(int tile) {
    auto& all = tiles.of(tile);
    if (tile_fault != 1) __builtin_memset(all, 0, sizeof all);
}

template <int TILE>
PYXLBERT_INLINE void load_tile(const void* from, std::int64_t stride) {
    model_load(TILE, from, stride);
}
template <int TILE>
PYXLBERT_INLINE void stream_tile(const void* from, std::int64_t stride) {
    model_load(TILE, from, stride);
}
template <int TILE>
PYXLBERT_INLINE void store_tile(void* to, std::int64_t stride) {
    model_store(TILE, to, stride);
}
template <int TILE>
PYXLBERT_INLINE void clear_tile() {
    model_clear(TILE);
}

// Calls step(c, a, b) with a row of C, the same of A in its units, and the rows of B.
template <class F>
PYXLBERT_INLINE void over_tile_rows(int c, int a, int b, F step) {
    auto &sums = tiles.of(c), &rows = tiles.of(a), &columns = tiles.of(b);
    if (++tiles.products % 5 == 0 && tile_fault == 2) return;
    for (int r = 0; r < TILE_ROWS; ++r) {
        std::uint32_t units[TILE_UNITS];
        __builtin_memcpy(units, rows[r], sizeof units);
        step(sums[r], units, columns);
    }
}

[[maybe_unused]] __attribute__((noinline)) void model_bf16(int c, int a, int b) {
    // To nearest, subnormals are zero, nothing is trapped.  The rows come from memory and return to it between the two
    // changes of the mode.
    constexpr unsigned mode = 0x1f80 | 1 << 15 | 1 << 6;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(mode);
    asm volatile("" : : : "memory");
    over_tile_rows(c, a, b, [](unsigned char* c, const std::uint32_t* a, const unsigned char (*b)[64]) PYXLBERT_LAMBDA {
        const auto high = [](VecU bits) PYXLBERT_LAMBDA {
            return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
        };
        Vec first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
        for (int k = 0; k < TILE_UNITS; ++k) {
            const VecU x = _mm512_set1_epi32(static_cast<int>(a[k])), y = _mm512_load_si512(b[k]);
            first = fma(high(_mm512_slli_epi32(x, 16)), high(_mm512_slli_epi32(y, 16)), first);
            second = fma(high(x), high(y), second);
        }
        auto* sums = reinterpret_cast<float*>(c);
        store(sums, load(sums) + (first + second));
    });
    asm volatile("" : : : "memory");
    _mm_setcsr(before);
}
template <int C, int A, int B>
PYXLBERT_INLINE void multiply_tiles_bf16() {
    model_bf16(C, A, B);
}

[[maybe_unused]] __attribute__((noinline)) void model_bytes(int c, int a, int b) {
    over_tile_rows(c, a, b, [](unsigned char* c, const std::uint32_t* a, const unsigned char (*b)[64]) PYXLBERT_LAMBDA {
        VecU sum = _mm512_load_si512(c);
        for (int k = 0; k < TILE_UNITS; ++k)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(static_cast<int>(a[k])), _mm512_load_si512(b[k]));
        _mm512_store_si512(c, sum);
    });
}
template <int C, int A, int B>
PYXLBERT_INLINE void multiply_tiles_bytes() {
    model_bytes(C, A, B);
}

}  // namespace
}  // namespace PYXLBERT_LEVEL
}  // namespace pyxlbert
