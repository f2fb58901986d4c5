"""relative_attention's backward: dquery, and of every block of queries what it adds to the gradients of the biases."""

from __future__ import annotations

from typing import Any, NamedTuple

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
from ._skew import Matrix, add_band, add_block, load_seen, products, rolled, skewed, unknown_zero, unskewed


class Known(NamedTuple):
    """Of BLOCK_M queries what is saved of them, each `[M]`: see `Saved`."""

    lse: Any
    lse_correction: Any
    delta: Any


class Matrices(NamedTuple):
    """What the queries meet, each a `Matrix`: keys, values, the table, and its gradient, whose base may be None."""

    key: Any
    value: Any
    band: Any
    dband: Any


class Sums(NamedTuple):
    """Of BLOCK_M queries sums over the keys, each `[M]`, for the term of segments.

    Attributes:
        same, other: the gradients of the scores with keys of the same and of the other segment.
        total: all gradients, where that is more than both.
        weight: the weights of the keys of the other segment.
    """

    same: Any
    other: Any
    total: Any
    weight: Any


class Carried(NamedTuple):
    """What a tile leaves for the next one, whose band begins where its own has its upper block.

    Attributes:
        scores: the products `[M, N]` of the queries with that block.
        gradients: those `[M, N]` of the tile that belong to it, in the band's order.
        first_j: the key that the next tile begins with, if it is not left out.
    """

    scores: Any
    gradients: Any
    first_j: Any


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
    FRESH: tl.constexpr = False,
    PIECES: tl.constexpr = None,
):
    """dquery of BLOCK_M queries, and what they add to the gradients of the biases and of the segment embedding.

    With a dtable also what they add to the gradient of the table, by atomics.
    """
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.queries), BLOCK_M)
    at = opened(call.sizes, plane)
    readable = readable_keys(at, OPTIONS)
    hidden = hiding_ranks(call, at, OPTIONS)
    keys = Matrix(first_row(call.key, at), call.key.row, readable, hidden)
    values = Matrix(first_row(call.value, at), call.value.row, readable, hidden)
    band = Matrix(first_table_row(call.table, at), call.table.row, number(call.table.rows), None)
    dband = Matrix(first_gradient_row(call, at, dtable, D), call.sizes.heads * D, number(call.table.rows), None)
    first_i = block * BLOCK_M
    dq_content = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq_position = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = no_sums(BLOCK_M)
    wide = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if first_i < at.queries:
        lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
        queries = load_queries(call, at, lines, D, BLOCK_D, BLOCK_M)
        known = load_known(saved, at, first_i, BLOCK_M)
        dq_content, dq_position, sums, zero = walk_keys(
            call, at, lines, queries, known, dout, Matrices(keys, values, band, dband),
            OPTIONS, PRECISION, D, BLOCK_N, CARRY, FRESH, PIECES,
        )  # fmt: skip
        if FRESH:
            # The places of what is stored, too, are computed behind the loop, and not carried through it.
            at = opened(call.sizes, plane + zero)
            first_i += zero
            lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
        if call.marks.key_segments is not None:
            sums = without_error(sums, OPTIONS)
        dq_segment = segment_gradients(call, at, sums, D, BLOCK_D)
        store_rows(dquery, at, dq_content + dq_position + dq_segment, first_i, at.queries, BLOCK_M, D, BLOCK_D)
        if call.marks.query_segments is not None and parts is not None:
            # Loaded again, as registers are short in the loop.
            wide = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D).to(tl.float32)
            wide = tl.where(lines.there[:, None], wide, 0.0)
    if parts is not None:
        # Blocks behind a packed sequence add zeros.
        store_parts(call, at, parts, dq_content, dq_position, sums, wide, D, BLOCK_D)


@triton.jit
def first_gradient_row(call, at, dtable, D: tl.constexpr):
    """The address of the first row of a plane's gradient of the table, or None."""
    if dtable is not None:
        group = at.b // number(call.table.sequences)
        return dtable + (group * number(call.table.rows) * (call.sizes.heads * D) + at.h * D)


@triton.jit
def load_known(saved, at, first_i, BLOCK_M: tl.constexpr):
    """`Known` of the BLOCK_M queries from row first_i on."""
    row = first_i + tl.arange(0, BLOCK_M)
    lse = load_lse(saved, at, row)
    delta, lse_correction = load_delta(saved, at, row)
    return Known(lse, lse_correction, delta)


@triton.jit
def no_sums(BLOCK_M: tl.constexpr):
    """`Sums` over no keys."""
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    return Sums(zeros, zeros, zeros, zeros)


@triton.jit
def walk_keys(
    call, at, lines, queries, known, dout, matrices, OPTIONS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, CARRY: tl.constexpr, FRESH: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M queries by way of content and of position, each `[M, BLOCK_D]`, `Sums`, and a zero:
    with FRESH an `unknown_zero`.

    For every tile of keys its scores s are computed again, from them the weights p and with dout the gradients g, which
    go to the keys' rows for content and to the band's for position.
    """
    BLOCK_M: tl.constexpr = queries.content.shape[0]
    BLOCK_D: tl.constexpr = queries.content.shape[1]
    SPARSE: tl.constexpr = (call.marks.key_rank is not None) or (call.mask.tensor is not None)
    ROLLED: tl.constexpr = CARRY and call.marks.positions is None
    # Long rows of float32 do not leave room for everything: where that spilled, `do` is loaded again for each tile.
    LONG: tl.constexpr = PRECISION == "ieee" and call.query.tensor.dtype.element_ty == tl.float32 and D > 64
    RELOAD: tl.constexpr = LONG and ((call.marks.positions is None) or SPARSE or (call.dropout.seed is not None))
    MUCH: tl.constexpr = (call.marks.key_segments is not None) and (SPARSE or (call.dropout.seed is not None))
    USUAL: tl.constexpr = 4 if MUCH or (call.marks.positions is not None) else 2
    CUT: tl.constexpr = USUAL if PIECES is None else PIECES
    dq_content = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq_position = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = no_sums(BLOCK_M)
    zero = 0
    if not RELOAD:
        do = load_douts(dout, at, lines.first, known.lse, OPTIONS.empty, BLOCK_M, D, BLOCK_D)
    moved = lines.top - lines.position
    carried = first_carried(call, lines, queries, matrices, ROLLED, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N)
    for first_j in range(0, end_of_keys(call, at, lines.first, OPTIONS, BLOCK_M), BLOCK_N):
        j = first_j + tl.arange(0, BLOCK_N)[None, :]
        live = True
        whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
        if SPARSE:
            settled = known.lse > 0.5 * UNIFORM_SCORE
            live, whole = classes(call, at, lines, first_j, j, settled, OPTIONS, BLOCK_M, BLOCK_N)
        near, first_i = matrices, lines.first
        if FRESH:
            zero = unknown_zero(zero, first_j)
            first_i += zero
            key, value, band = matrices.key, matrices.value, matrices.band
            near = Matrices(
                Matrix(key.base, key.stride + zero, key.count, key.rank),
                Matrix(value.base, value.stride + zero, value.count, value.rank),
                Matrix(band.base, band.stride + zero, band.count, band.rank),
                matrices.dband,
            )
        if live:
            k = load_seen(near.key, first_j, BLOCK_N, D, BLOCK_D)
            s, carried = position_scores(
                call, lines, queries, near, carried, first_j, moved,
                SPARSE, ROLLED, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            s = tile_scores(call, at, s, queries.content, k, queries, lines, j, whole, OPTIONS, PRECISION, CUT)
            p = weights_of(s, known.lse[:, None], known.lse_correction[:, None])
            v = load_seen(near.value, first_j, BLOCK_N, D, BLOCK_D)
            if RELOAD:
                do = load_douts(dout, at, first_i, known.lse, OPTIONS.empty, BLOCK_M, D, BLOCK_D)
            g, sums = tile_gradients(
                call, at, p, do, v, lines, queries, known.delta, sums, first_j, j, OPTIONS, PRECISION, CUT, BLOCK_N
            )
            dq_content = add_product(g.to(k.dtype), k, dq_content, PRECISION)
            dq_position, carried = add_positions(
                call, dq_position, carried, g, lines, queries, near, first_j, moved,
                SPARSE, ROLLED, PRECISION, D, BLOCK_D,
            )  # fmt: skip
    if ROLLED:
        dq_position = add_block(
            dq_position, carried.gradients, queries.position, matrices.band, matrices.dband,
            number(call.table.offset) + carried.first_j - lines.top, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    return dq_content, dq_position, sums, zero


@triton.jit
def first_carried(
    call, lines, queries, matrices, ROLLED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the tile of the first keys finds carried; without ROLLED zeros, which nobody asks for."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scores = zeros
    if ROLLED:
        place = number(call.table.offset) - lines.top
        scores = products(queries.position, matrices.band, place, PRECISION, D, BLOCK_D, BLOCK_N)
    return Carried(scores, zeros, 0)


@triton.jit
def position_scores(
    call, lines, queries, matrices, carried, first_j, moved, SPARSE: tl.constexpr, ROLLED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's scores by position, every line `moved` by so many columns, and what is carried.

    With ROLLED only the upper block of the band is multiplied: the lower one was, as the upper one of the tile before,
    unless that was left out, as those of SPARSE may be.
    """
    place = number(call.table.offset) + first_j - lines.top
    x, band = queries.position, matrices.band
    scores = carried.scores
    if ROLLED:
        if SPARSE and carried.first_j != first_j:
            scores = products(x, band, place, PRECISION, D, BLOCK_D, BLOCK_N)
        s, scores = rolled(x, scores, band, place, moved, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N)
    else:
        IN_ORDER: tl.constexpr = call.marks.positions is None
        spread = lines.top - lines.bottom
        s = skewed(x, band, place, moved, spread, IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N)
    return s, Carried(scores, carried.gradients, carried.first_j)


@triton.jit
def tile_gradients(
    call, at, p, do, v, lines, queries, delta, sums, first_j, j,
    OPTIONS: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g `[M, N]`, the gradients of a tile's scores, and the sums with what the tile adds.

    g = p (dp - delta): p are the weights, dp the products of dout and the values, behind dropout.
    """
    same, other, total, weight = sums
    dp = row_products(do, v, None, PRECISION, PIECES)
    if call.dropout.seed is not None:
        keep = kept(call.dropout, lines.number[:, None], first_j, at, OPTIONS.tag, BLOCK_N)
        dp = tl.where(keep, dp * call.dropout.keep_scale, 0.0)
    g = p * (dp - delta[:, None]) * call.scale
    if OPTIONS.causal and OPTIONS.uniform_rows:
        if call.marks.key_segments is not None:
            total += tl.sum(g, 1)
        # Such a score is a constant.
        g = tl.where(j <= lines.number[:, None] + at.shift, g, 0.0)
    if call.marks.key_segments is not None:
        differs = is_other_segment(call, at, queries, j)
        same += tl.sum(tl.where(differs, 0.0, g), 1)
        other += tl.sum(tl.where(differs, g, 0.0), 1)
        weight += tl.sum(tl.where(differs, p, 0.0), 1)
    return g, Sums(same, other, total, weight)


@triton.jit
def add_positions(
    call, dq_position, carried, g, lines, queries, matrices, first_j, moved,
    SPARSE: tl.constexpr, ROLLED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq_position with what a tile's g adds by way of the band, and what is carried; beside them the table's gradient.

    With ROLLED the gradients of the lower block are added together with the carried ones, and those of the upper block
    are carried: every block of the table is multiplied once.
    """
    BLOCK_M: tl.constexpr = g.shape[0]
    BLOCK_N: tl.constexpr = g.shape[1]
    place = number(call.table.offset) + first_j - lines.top
    x, band, dband = queries.position, matrices.band, matrices.dband
    gradients, next_j = carried.gradients, carried.first_j
    if ROLLED:
        if SPARSE and next_j != first_j:
            before = number(call.table.offset) + next_j - lines.top
            dq_position = add_block(dq_position, gradients, x, band, dband, before, PRECISION, D, BLOCK_D, BLOCK_N)
            gradients = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        back, inside = unskewed(g, moved, BLOCK_M, BLOCK_N)
        low = tl.where(inside, back, gradients)
        dq_position = add_block(dq_position, low, x, band, dband, place, PRECISION, D, BLOCK_D, BLOCK_N)
        gradients = tl.where(inside, 0.0, back)
        next_j = first_j + BLOCK_N
    else:
        IN_ORDER: tl.constexpr = call.marks.positions is None
        spread = lines.top - lines.bottom
        dq_position = add_band(
            dq_position, g, x, band, dband, place, moved, spread, IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N
        )
    return dq_position, Carried(carried.scores, gradients, next_j)


@triton.jit
def without_error(sums, OPTIONS: tl.constexpr):
    """The sums without what rounding has left in them.

    Gradients of a row are p (dp - delta), and their sum is 0: what is found instead is the error of delta, a sum over
    rounded results, times the weights.
    """
    total = sums.total
    if not (OPTIONS.causal and OPTIONS.uniform_rows):
        total = sums.same + sums.other
    same = sums.same - total * (1.0 - sums.weight)
    return Sums(same, sums.other - total * sums.weight, total, sums.weight)


@triton.jit
def segment_gradients(call, at, sums, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradients `[M, BLOCK_D]` of the queries by way of the term of segments."""
    same = load_vector(call.biases.embedding, at.h, D, BLOCK_D)[None, :]
    other = load_vector(call.biases.embedding, call.sizes.heads + at.h, D, BLOCK_D)[None, :]
    return sums.same[:, None] * same + sums.other[:, None] * other


@triton.jit
def store_parts(call, at, parts, dq_content, dq_position, sums, wide, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's share `[5, D]` of the gradients of the three biases and of both segments' embeddings."""
    d = tl.arange(0, BLOCK_D)
    place = parts + tl.program_id(0).to(tl.int64) * (5 * D) + d
    tl.store(place, tl.sum(dq_content, 0), mask=d < D)
    tl.store(place + D, tl.sum(dq_position, 0), mask=d < D)
    total_same = tl.sum(sums.same, 0) * load_vector(call.biases.embedding, at.h, D, BLOCK_D)
    total_other = tl.sum(sums.other, 0) * load_vector(call.biases.embedding, call.sizes.heads + at.h, D, BLOCK_D)
    tl.store(place + 2 * D, total_same + total_other, mask=d < D)
    asks = wide + load_vector(call.biases.segment, at.h, D, BLOCK_D)[None, :]
    tl.store(place + 3 * D, tl.sum(sums.same[:, None] * asks, 0), mask=d < D)
    tl.store(place + 4 * D, tl.sum(sums.other[:, None] * asks, 0), mask=d < D)
