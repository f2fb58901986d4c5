// How the work of relative attention's backward is cut into tasks, and what a task needs of memory.
#pragma once
#include "backward_rows.h"
#include "relative_rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

constexpr std::int64_t SPAN = 192;  // positions that rows of a tile lie apart at most
constexpr std::int64_t BAND_STRIDE = BACKWARD_BLOCK + SPAN + 32;
constexpr int STREAMS = 2;

// Tiles whose dr is added one after the other.  A row of the table meets no more than some MAX_IN_PASS of those of one
// key block: each has moved on by as many rows as it has queries.
constexpr std::int64_t TABLE_TOGETHER = 32, MAX_IN_PASS = 16;

// Sums over all rows of a plane: gradients of the biases and of the two segment embeddings.
enum Small { content, position, segment, same_segment, other_segment, SMALL };

// How the work is cut; nothing in it depends on the number of threads.
struct Plan {
    std::int64_t planes, blocks;
    std::int64_t parts;    // runs of key blocks
    std::int64_t slices;   // heads of tables
    std::int64_t members;  // sequences of a table
    std::int64_t groups;   // runs of members, each with a partial dr of its own
    std::int64_t rows, last_place;
    std::int64_t units, unit_stride, columns;  // of a row of q and k; unit_stride and columns are multiples of W
    std::int64_t dquery, table_rows;           // floats of a plane's dQ, rows of a partial dr
    std::int64_t table_stride;                 // of a partial dr that tiles sum
    bool many_tiles;                           // dK and dV are summed in two steps
    bool gathers_table;                        // dr is
    std::int64_t values, sums, dtable, task;   // floats of scratch
};

PYXLBERT_INLINE std::int64_t first_block(const Plan& plan, std::int64_t part) {
    return plan.blocks * part / plan.parts;
}

template <class U>
PYXLBERT_INLINE Plan make_plan(const RelativeAttentionBwd& a) {
    constexpr std::int64_t enough_tasks = 16, max_parts = 8, blocks_a_part = 2;
    const AttentionCall& in = a.in.in;
    Plan p;
    p.planes = in.batch * in.heads;
    p.blocks = ceil_divide(in.keys, BACKWARD_BLOCK);
    p.slices = a.in.tables * in.heads;
    p.members = in.batch / a.in.tables;
    p.groups = smaller(p.members, ceil_divide(enough_tasks, p.slices));
    p.parts = larger(
        1, smaller(smaller(ceil_divide(enough_tasks, p.slices * p.groups), p.blocks / blocks_a_part), max_parts));
    p.rows = a.streams[0].count + a.streams[1].count;
    p.last_place = a.streams[0].positions != nullptr ? a.in.offset : larger(in.queries - 1, 0);
    p.units = round_to(ceil_divide(in.head_size, U::PAIR), U::K_STEP);
    p.unit_stride = round_to(p.units, W);
    p.columns = round_to(in.head_size, W);
    p.dquery = p.rows * p.columns;
    p.table_rows = ceil_divide(p.blocks, p.parts) * BACKWARD_BLOCK + p.last_place + STRIP_ROWS + 1;
    // An odd number of cache lines, and room for a vector past the last row.
    p.table_stride = (round_to(p.table_rows + W, W) / W | 1) * W;
    p.values = values_room<U>(p.columns);
    p.sums = sums_room<U>(p.columns);
    const std::int64_t tile =
        TILE<U> * (2 * SCORE_STRIDE + 2 * BAND_STRIDE + 3 * p.unit_stride + p.columns) + 3 * p.values;
    // A stream ends in a tile of its own.
    const std::int64_t tiles = ceil_divide(p.rows, TILE<U>) + 1;
    p.many_tiles = tiles > TILES_TOGETHER;
    const std::int64_t passes = ceil_divide(p.blocks, p.parts) * ceil_divide(p.members, p.groups);
    p.gathers_table = a.dtable != nullptr && smaller(tiles, MAX_IN_PASS) * passes > TABLE_TOGETHER;
    const std::int64_t sums = (p.many_tiles ? 4 : 2) * p.sums;
    const std::int64_t keys = BACKWARD_BLOCK * (2 * p.unit_stride + p.columns) + sums + SCORE_STRIDE;
    const std::int64_t table = round_to(BACKWARD_BLOCK + SPAN, W) * (p.unit_stride + p.columns);
    const std::int64_t rows = 7 * round_to(p.rows, 16) + 2 * TILE<U> + (3 + 2 * SMALL) * p.columns;
    // Tiles sum a partial dr transposed, all others sum it where it stays unless it is gathered.
    const std::int64_t one_table = p.table_rows * p.columns;
    p.dtable = a.dtable == nullptr ? 0 : TILES<U> ? p.columns * p.table_stride : p.gathers_table ? one_table : 0;
    const std::int64_t lost = p.gathers_table ? one_table : 0;
    p.task = round_to((p.parts == 1 ? p.dquery : 0) + p.dtable + lost + tile + keys + table + rows, 1024) + 64;
    return p;
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
