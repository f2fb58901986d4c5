"""relative_attention's forward: a running softmax over the keys; see _relative.py and _skew.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    INFINITY,
    UNIFORM_SCORE,
    block_and_plane,
    first_row,
    kept,
    number,
    opened,
    softmax_step,
    store_results,
    typed,
)
from ._parts import keys_of_part, part_and_plane, store_part
from ._relative_scores import (
    classes,
    end_of_keys,
    first_table_row,
    hiding_ranks,
    is_whole,
    load_queries,
    query_lines,
    readable_keys,
    tile_scores,
)
from ._skew import Matrix, load_seen, products, rolled, skewed


@triton.jit
def fwd(
    call,
    out,
    lse,
    partial,
    OPTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CARRY: tl.constexpr,
):
    """out and lse of BLOCK_M queries; with a record of parts what one part of the keys adds to them."""
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.queries), BLOCK_M)
    part, plane = part_and_plane(partial, plane)
    at = opened(call.sizes, plane)
    IN_ORDER: tl.constexpr = call.marks.positions is None
    SPARSE: tl.constexpr = (call.marks.key_rank is not None) or (call.mask.tensor is not None)
    ROLLED: tl.constexpr = CARRY and call.marks.positions is None
    first_i = block * BLOCK_M
    if first_i < at.queries:
        readable = readable_keys(at, OPTIONS)
        hidden = hiding_ranks(call, at, OPTIONS)
        keys = Matrix(first_row(call.key, at), call.key.row, readable, hidden)
        values = Matrix(first_row(call.value, at), call.value.row, readable, hidden)
        band = Matrix(first_table_row(call.table, at), call.table.row, number(call.table.rows), None)
        lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
        queries = load_queries(call, at, lines, D, BLOCK_D, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        moved = lines.top - lines.position
        low, high = keys_of_part(partial, part, end_of_keys(call, at, first_i, OPTIONS, BLOCK_M))
        if ROLLED:
            # The products with the upper block of a tile's band are those with the lower one of the next.
            row = number(call.table.offset) + low - lines.top
            lower = products(queries.position, band, row, PRECISION, D, BLOCK_D, BLOCK_N)
            lower_at = low
        for first_j in range(low, high, BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)[None, :]
            live = True
            whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
            if SPARSE:
                live, whole = classes(
                    call, at, lines, first_j, j, largest > 0.5 * UNIFORM_SCORE, OPTIONS, BLOCK_M, BLOCK_N
                )
            if live:
                k = load_seen(keys, first_j, BLOCK_N, D, BLOCK_D)
                row = number(call.table.offset) + first_j - lines.top
                if ROLLED:
                    if SPARSE and lower_at != first_j:
                        lower = products(queries.position, band, row, PRECISION, D, BLOCK_D, BLOCK_N)
                    s, lower = rolled(
                        queries.position, lower, band, row, moved, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N
                    )
                    lower_at = first_j + BLOCK_N
                else:
                    s = skewed(
                        queries.position, band, row, moved, lines.top - lines.bottom,
                        IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                s = tile_scores(call, at, s, queries.content, k, queries, lines, j, whole, OPTIONS, PRECISION)
                p, less, weight, largest = softmax_step(s, weight, largest)
                if call.dropout.seed is not None:
                    p = tl.where(kept(call.dropout, lines.number[:, None], first_j, at, OPTIONS.tag, BLOCK_N), p, 0.0)
                v = load_seen(values, first_j, BLOCK_N, D, BLOCK_D)
                acc = tl.dot(p.to(v.dtype), v, acc * less[:, None], input_precision=PRECISION)
        if partial is not None:
            store_part(partial, at, part, first_i, acc, weight, largest, BLOCK_M, D, BLOCK_D)
        else:
            factor = call.dropout.keep_scale
            store_results(out, lse, at, first_i, acc, weight, largest, factor, call.sizes, BLOCK_M, D, BLOCK_D)
