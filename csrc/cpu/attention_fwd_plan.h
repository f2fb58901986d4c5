// How attention's forward is cut into blocks, chunks and tiles, and what a thread needs of memory.
#pragma once
#include "attention_rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

constexpr std::int64_t FORWARD_BLOCK = 512;
constexpr std::int64_t SCORE_STRIDE = FORWARD_BLOCK + 32;  // not a power of two: rows would share cache sets
// A band's columns: a block, what rounding to vectors adds, and either a tile's rows or SPAN.
constexpr std::int64_t BAND_STRIDE = FORWARD_BLOCK + 96;
constexpr std::int64_t SPAN = 64;  // positions that rows of one product with the band lie apart at most
constexpr std::int64_t FARTHEST = INT64_MAX;

// Queries of a tile: for tiles of 16 rows the next multiple of 32.
template <class U>
constexpr std::int64_t TILE = U::ROW_STEP == 16 ? 32 : 24;

// Queries of a call, of both streams together, that are worth no packing.
constexpr std::int64_t FEW_QUERIES = 4;

// Tiles begin at multiples of it.
constexpr std::int64_t TILE_STEP = 8;

// Queries of a tile that meets n keys.  A band is as many columns wider than the keys as the tile has rows, so few keys
// take tiles of fewer rows: with 16 the band begins at a whole vector besides.
template <class U, bool RELATIVE>
PYXLBERT_INLINE std::int64_t tile_rows(std::int64_t n) {
    return RELATIVE && U::ROW_STEP == 2 && n <= 256 ? 16 : TILE<U>;
}

// Queries of a chunk, a multiple of every tile: packing a block of keys costs 2 % of so many rows' products.
template <bool RELATIVE>
constexpr std::int64_t CHUNK = RELATIVE ? 384 : 768;

// Floats of one thread's scratch.
struct Sizes {
    std::int64_t units, unit_stride, columns;  // of a row of q and k; unit_stride and columns are multiples of W
    std::int64_t chunk, table;                 // rows
    std::int64_t q, o, k, v, product, total;
};

template <class U, bool RELATIVE>
PYXLBERT_INLINE Sizes sizes_of(const AttentionCall& in, std::int64_t rows, bool apart) {
    Sizes s;
    s.units = round_to((in.head_size + U::PAIR - 1) / U::PAIR, U::K_STEP);
    s.unit_stride = round_to(s.units, W);
    s.columns = round_to(in.head_size, W);
    // A second set of rows begins at a tile of its own.
    s.chunk = smaller(CHUNK<RELATIVE>, round_to(rows, TILE<U>)) + (RELATIVE ? TILE<U> : 0);
    const std::int64_t keys = smaller(FORWARD_BLOCK, round_to(in.keys, W * 2));
    // Rows at positions of their own may be few and far apart, but no farther than a whole chunk.
    s.table = RELATIVE ? round_to(keys + (apart ? CHUNK<true> : s.chunk), W) : 0;
    s.q = s.chunk * s.unit_stride;
    s.o = s.chunk * s.columns;
    s.k = keys * s.unit_stride;
    s.v = keys / U::PAIR * s.columns;
    s.product = TILE<U> * s.columns;
    const std::int64_t relative = RELATIVE ? s.q + TILE<U> * BAND_STRIDE + s.table * s.unit_stride : 0;
    const std::int64_t rows_of_chunk = 6 * round_to(s.chunk, 16);
    const std::int64_t tile = TILE<U> * SCORE_STRIDE + s.product + TILE<U>;
    s.total = round_to(tile + s.q + s.o + s.k + s.v + relative + rows_of_chunk, 1024) + 64;
    return s;
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
