"""relative_attention's backward: dquery, and of every block of queries what it adds to the gradients of the biases."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    UNIFORM_SCORE,
    block_and_plane,
    first_row,
    kept,
    load_delta,
    load_douts,
    load_lse,
    load_rows,
    number,
    opened,
    store_rows,
    typed,
    weights_of,
)
from ._products import add_product, row_products
from ._relative_scores import (
    classes,
    end_of_keys,
    first_table_row,
    hiding_ranks,
    is_other_segment,
    is_whole,
    load_queries,
    load_vector,
    query_lines,
    readable_keys,
    tile_scores,
)
from ._skew import Matrix, add_band, add_block, load_seen, products, rolled, skewed, unskewed


@triton.jit
def bwd_queries(
    call,
    dout,
    saved,
    dquery,
    parts,
    dtable,
    OPTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CARRY: tl.constexpr,
):
    """dquery of BLOCK_M queries, and what they add to the gradients of the biases and of the segment embedding.

    With a dtable also what they add to the gradient of the table, by atomics.
    """
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.queries), BLOCK_M)
    at = opened(call.sizes, plane)
    IN_ORDER: tl.constexpr = call.marks.positions is None
    SPARSE: tl.constexpr = (call.marks.key_rank is not None) or (call.mask.tensor is not None)
    ROLLED: tl.constexpr = CARRY and call.marks.positions is None
    # Long rows of float32 do not leave room for everything: where that spilled, `do` is loaded again for each tile.
    LONG: tl.constexpr = PRECISION == "ieee" and call.query.tensor.dtype.element_ty == tl.float32 and D > 64
    RELOAD: tl.constexpr = LONG and ((call.marks.positions is None) or SPARSE or (call.dropout.seed is not None))
    MUCH: tl.constexpr = (call.marks.key_segments is not None) and (SPARSE or (call.dropout.seed is not None))
    PIECES: tl.constexpr = 4 if MUCH or (call.marks.positions is not None) else 2
    readable = readable_keys(at, OPTIONS)
    hidden = hiding_ranks(call, at, OPTIONS)
    keys = Matrix(first_row(call.key, at), call.key.row, readable, hidden)
    values = Matrix(first_row(call.value, at), call.value.row, readable, hidden)
    band = Matrix(first_table_row(call.table, at), call.table.row, number(call.table.rows), None)
    dband = None
    if dtable is not None:
        dband = dtable + (
            (at.b // number(call.table.sequences)) * number(call.table.rows) * (call.sizes.heads * D) + at.h * D
        )
    gradient = Matrix(dband, call.sizes.heads * D, number(call.table.rows), None)
    first_i = block * BLOCK_M
    dq_content = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq_position = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    g_same = tl.zeros((BLOCK_M,), tl.float32)
    g_other = tl.zeros((BLOCK_M,), tl.float32)
    # Of each row the sum of all gradients, and the weight of the keys of the other segment.
    g_total = tl.zeros((BLOCK_M,), tl.float32)
    other_weight = tl.zeros((BLOCK_M,), tl.float32)
    wide = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if first_i < at.queries:
        lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
        queries = load_queries(call, at, lines, D, BLOCK_D, BLOCK_M)
        row = first_i + tl.arange(0, BLOCK_M)
        lse = load_lse(saved, at, row)
        delta, lse_correction = load_delta(saved, at, row)
        if not RELOAD:
            do = load_douts(dout, at, first_i, lse, OPTIONS.empty, BLOCK_M, D, BLOCK_D)
        moved = lines.top - lines.position
        if ROLLED:
            # Of the tile before: products with the upper block of its band, and its gradients that belong there.
            lower = products(
                queries.position, band, number(call.table.offset) - lines.top, PRECISION, D, BLOCK_D, BLOCK_N
            )
            carried = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            lower_at = 0
        for first_j in range(0, end_of_keys(call, at, first_i, OPTIONS, BLOCK_M), BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)[None, :]
            live = True
            whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
            if SPARSE:
                live, whole = classes(call, at, lines, first_j, j, lse > 0.5 * UNIFORM_SCORE, OPTIONS, BLOCK_M, BLOCK_N)
            if live:
                k = load_seen(keys, first_j, BLOCK_N, D, BLOCK_D)
                place = number(call.table.offset) + first_j - lines.top
                if ROLLED:
                    if SPARSE and lower_at != first_j:
                        lower = products(queries.position, band, place, PRECISION, D, BLOCK_D, BLOCK_N)
                    s, lower = rolled(
                        queries.position, lower, band, place, moved, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N
                    )
                else:
                    s = skewed(
                        queries.position, band, place, moved, lines.top - lines.bottom,
                        IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                s = tile_scores(call, at, s, queries.content, k, queries, lines, j, whole, OPTIONS, PRECISION, PIECES)
                p = weights_of(s, lse[:, None], lse_correction[:, None])
                v = load_seen(values, first_j, BLOCK_N, D, BLOCK_D)
                if RELOAD:
                    do = load_douts(dout, at, first_i, lse, OPTIONS.empty, BLOCK_M, D, BLOCK_D)
                dp = row_products(do, v, None, PRECISION, PIECES)
                if call.dropout.seed is not None:
                    keep = kept(call.dropout, lines.number[:, None], first_j, at, OPTIONS.tag, BLOCK_N)
                    dp = tl.where(keep, dp * call.dropout.keep_scale, 0.0)
                g = p * (dp - delta[:, None]) * call.scale
                if OPTIONS.causal and OPTIONS.uniform_rows:
                    if call.marks.key_segments is not None:
                        g_total += tl.sum(g, 1)
                    # Such a score is a constant.
                    g = tl.where(j <= lines.number[:, None] + at.shift, g, 0.0)
                if call.marks.key_segments is not None:
                    other = is_other_segment(call, at, queries, j)
                    g_same += tl.sum(tl.where(other, 0.0, g), 1)
                    g_other += tl.sum(tl.where(other, g, 0.0), 1)
                    other_weight += tl.sum(tl.where(other, p, 0.0), 1)
                dq_content = add_product(g.to(k.dtype), k, dq_content, PRECISION)
                if ROLLED:
                    if SPARSE and lower_at != first_j:
                        dq_position = add_block(
                            dq_position, carried, queries.position, band, gradient,
                            number(call.table.offset) + lower_at - lines.top, PRECISION, D, BLOCK_D, BLOCK_N,
                        )  # fmt: skip
                        carried = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    back, inside = unskewed(g, moved, BLOCK_M, BLOCK_N)
                    dq_position = add_block(
                        dq_position, tl.where(inside, back, carried), queries.position, band, gradient, place,
                        PRECISION, D, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                    carried = tl.where(inside, 0.0, back)
                    lower_at = first_j + BLOCK_N
                else:
                    dq_position = add_band(
                        dq_position, g, queries.position, band, gradient, place, moved, lines.top - lines.bottom,
                        IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
        if ROLLED:
            dq_position = add_block(
                dq_position, carried, queries.position, band, gradient,
                number(call.table.offset) + lower_at - lines.top, PRECISION, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip
        if call.marks.key_segments is not None:
            # Gradients of a row are p (dp - delta), and their sum is 0: what is found instead is the error of delta, a
            # sum over rounded results, times the weights.
            if not (OPTIONS.causal and OPTIONS.uniform_rows):
                g_total = g_same + g_other
            g_same -= g_total * (1.0 - other_weight)
            g_other -= g_total * other_weight
        same_vector = load_vector(call.biases.embedding, at.h, D, BLOCK_D)[None, :]
        other_vector = load_vector(call.biases.embedding, call.sizes.heads + at.h, D, BLOCK_D)[None, :]
        dq_segment = g_same[:, None] * same_vector + g_other[:, None] * other_vector
        store_rows(dquery, at, dq_content + dq_position + dq_segment, first_i, at.queries, BLOCK_M, D, BLOCK_D)
        if call.marks.query_segments is not None and parts is not None:
            # Loaded again, as registers are short in the loop.
            wide = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D).to(tl.float32)
            wide = tl.where(lines.there[:, None], wide, 0.0)
    if parts is not None:
        # Blocks behind a packed sequence add zeros.
        store_parts(call, at, parts, dq_content, dq_position, g_same, g_other, wide, D, BLOCK_D)


@triton.jit
def store_parts(
    call, at, parts, dq_content, dq_position, g_same, g_other, wide, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A program's share `[5, D]` of the gradients of the three biases and of both segments' embeddings."""
    d = tl.arange(0, BLOCK_D)
    place = parts + tl.program_id(0).to(tl.int64) * (5 * D) + d
    tl.store(place, tl.sum(dq_content, 0), mask=d < D)
    tl.store(place + D, tl.sum(dq_position, 0), mask=d < D)
    total_same = tl.sum(g_same, 0) * load_vector(call.biases.embedding, at.h, D, BLOCK_D)
    total_other = tl.sum(g_other, 0) * load_vector(call.biases.embedding, call.sizes.heads + at.h, D, BLOCK_D)
    tl.store(place + 2 * D, total_same + total_other, mask=d < D)
    asks = wide + load_vector(call.biases.segment, at.h, D, BLOCK_D)[None, :]
    tl.store(place + 3 * D, tl.sum(g_same[:, None] * asks, 0), mask=d < D)
    tl.store(place + 4 * D, tl.sum(g_other[:, None] * asks, 0), mask=d < D)
