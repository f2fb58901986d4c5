"""relative_attention's forward: a running softmax over the keys; see _relative.py and _skew.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._relative_scores import (
    end_of_keys,
    first_table_row,
    load_queries,
    numbers_before,
    query_lines,
    some_seen,
    tile_scores,
)
from ._scores import (
    INFINITY,
    UNIFORM_SCORE,
    block_and_plane,
    first_row,
    kept,
    opened,
    softmax_step,
    store_results,
)
from ._skew import Matrix, load_seen, products, rolled, skewed


@triton.jit
def fwd(
    query,
    key,
    value,
    table,
    biases,
    marks,
    mask,
    sizes,
    scale,
    dropout,
    out,
    lse,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_POSITION: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CARRY: tl.constexpr,
):
    """out and lse of BLOCK_M queries."""
    block, plane = block_and_plane(sizes.queries, BLOCK_M)
    at = opened(sizes, plane)
    IN_ORDER: tl.constexpr = marks.positions is None
    SPARSE: tl.constexpr = (marks.key_rank is not None) or (mask.tensor is not None)
    ROLLED: tl.constexpr = CARRY and marks.positions is None
    first_i = block * BLOCK_M
    if first_i < at.queries:
        # Where a row without any key averages over all of them, all of them are read.
        readable = at.extent if UNIFORM else at.keys
        hidden = None
        if marks.key_rank is not None and not UNIFORM:
            hidden = marks.key_rank + numbers_before(sizes.keys, sizes, at)
        keys = Matrix(first_row(key, at), key.row, readable, hidden)
        values = Matrix(first_row(value, at), value.row, readable, hidden)
        band = Matrix(first_table_row(table, at), table.row, table.rows, None)
        lines = query_lines(marks, sizes, at, first_i, BY_POSITION, BLOCK_M)
        queries = load_queries(query, biases, marks, sizes, lines, at, D, BLOCK_D, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        moved = lines.top - lines.position
        if ROLLED:
            # The products with the upper block of a tile's band are those with the lower one of the next.
            lower = products(queries.position, band, table.offset - lines.top, PRECISION, D, BLOCK_D, BLOCK_N)
            lower_at = 0
        for first_j in range(0, end_of_keys(at, first_i, CAUSAL, UNIFORM, IN_ORDER, BLOCK_M), BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)[None, :]
            live = True
            if SPARSE:
                live = some_seen(
                    lines, first_j, j, marks, mask, sizes, at, largest > 0.5 * UNIFORM_SCORE,
                    CAUSAL, SEE_SELF, UNIFORM, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if live:
                k = load_seen(keys, first_j, BLOCK_N, D, BLOCK_D)
                row = table.offset + first_j - lines.top
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
                s = tile_scores(
                    s, queries.content, k, queries, lines, j, marks, mask, sizes, at, scale,
                    CAUSAL, SEE_SELF, UNIFORM, PRECISION,
                )  # fmt: skip
                p, less, weight, largest = softmax_step(s, weight, largest)
                if dropout.seed is not None:
                    p = tl.where(kept(dropout, lines.number[:, None], first_j, at, TAG, BLOCK_N), p, 0.0)
                v = load_seen(values, first_j, BLOCK_N, D, BLOCK_D)
                acc = tl.dot(p.to(v.dtype), v, acc * less[:, None], input_precision=PRECISION)
        store_results(out, lse, at, first_i, acc, weight, largest, dropout.keep_scale, sizes, BLOCK_M, D, BLOCK_D)
