// How the work of attention's backward is cut into tasks, and what a task needs of memory.
#pragma once
#include "backward_rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// How the work is cut; nothing in it depends on the number of threads.
struct Plan {
    std::int64_t planes, blocks;
    std::int64_t parts;    // runs of key blocks
    std::int64_t slices;   // planes that share no element of dbias with another slice
    std::int64_t members;  // planes of a slice
    std::int64_t groups;   // runs of members, each with partial sums of its own
    bool sums_bias;        // dbias is summed; otherwise each of its elements is written once
    bool fills_bias;       // every plane has every element of its slice of dbias
    bool in_place;         // dbias is where it is summed
    bool keeps_lost;       // partial sums of dbias keep what they have rounded off, in as much memory again
    bool many_tiles;       // dK and dV are summed in two steps
    std::int64_t bias_queries, bias_keys, bias_partials, bias_slice;

    std::int64_t units, unit_stride, columns, query_rows;
    std::int64_t dquery, delta, values, sums, tile, keys, task;  // floats of scratch
};

template <class U>
PYXLBERT_INLINE Plan make_plan(const AttentionBwd& a) {
    constexpr std::int64_t enough_tasks = 32, max_parts = 8, blocks_a_part = 2, max_groups = 16;
    const AttentionCall& in = a.in;
    Plan p;
    p.planes = in.batch * in.heads;
    p.blocks = ceil_divide(in.keys, BACKWARD_BLOCK);
    p.slices = p.planes;
    p.members = p.groups = 1;
    p.sums_bias = p.fills_bias = p.keeps_lost = false;
    p.bias_queries = p.bias_keys = p.bias_slice = 0;
    if (a.dbias != nullptr) {
        const std::int64_t* shape = a.bias_shape;
        p.slices = shape[0] * shape[1];
        p.members = p.planes / p.slices;
        p.bias_queries = shape[2];
        p.bias_keys = shape[3];
        p.bias_slice = shape[2] * shape[3];
        p.sums_bias = p.members > 1 || shape[2] != in.queries || shape[3] != in.keys;
        p.fills_bias = shape[2] == in.queries && shape[3] == in.keys && !in.options.causal &&
                       in.key_lengths == nullptr && in.keys > 1;
        // Partial sums take no more memory than the queries do, or twice that.
        if (p.sums_bias) {
            const std::int64_t room = p.planes * in.queries * in.head_size / (p.slices * p.bias_slice);
            const std::int64_t rows = (shape[2] == 1 ? in.queries : 1) * (shape[3] == 1 ? p.blocks : 1);
            p.groups = larger(1, smaller(smaller(room, max_groups), p.members));
            p.keeps_lost = p.members / p.groups * rows > RUN_LENGTH;
        }
    }
    p.parts = larger(
        1, smaller(smaller(ceil_divide(enough_tasks, p.slices * p.groups), p.blocks / blocks_a_part), max_parts));
    // A bias that is the same for all keys is summed over the parts too.
    p.bias_partials = p.sums_bias ? p.groups * (p.bias_keys == 1 ? p.parts : 1) : 0;
    p.in_place = p.bias_partials == 1 && in.bias_dtype == DType::float32;

    p.units = round_to(ceil_divide(in.head_size, U::PAIR), U::K_STEP);
    p.unit_stride = round_to(p.units, W);
    p.columns = round_to(in.head_size, W);
    p.query_rows = round_to(in.queries, U::ROW_STEP);
    p.dquery = p.query_rows * p.columns;
    p.delta = round_to(in.queries, 16);
    p.values = values_room<U>(p.columns);
    p.sums = sums_room<U>(p.columns);
    p.tile = TILE<U> * (2 * SCORE_STRIDE + 2 * p.unit_stride) + 2 * p.values;
    p.many_tiles = ceil_divide(in.queries, TILE<U>) > TILES_TOGETHER;
    const std::int64_t sums = (p.many_tiles ? 4 : 2) * p.sums;
    p.keys = BACKWARD_BLOCK * (2 * p.unit_stride + p.columns) + sums + SCORE_STRIDE;
    p.task = round_to((p.parts == 1 ? p.dquery : 0) + 3 * p.delta + p.tile + p.keys, 1024) + 64;
    return p;
}

// The planes of slice `slice`, in order: member m of a bias that is broadcast over batch, heads or both.
PYXLBERT_INLINE std::int64_t member_plane(const AttentionBwd& a, std::int64_t slice, std::int64_t m) {
    if (a.dbias == nullptr) return slice;
    const std::int64_t heads = a.in.heads;
    const bool one_batch = a.bias_shape[0] == 1, one_head = a.bias_shape[1] == 1;
    if (one_batch && one_head) return m;
    if (one_batch) return m * heads + slice;
    if (one_head) return slice * heads + m;
    return slice;
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
