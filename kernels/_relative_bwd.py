"""relative_attention's backward from lse alone, all but dquery; see _relative.py and _skew.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    INFINITY,
    PADDED,
    UNIFORM_SCORE,
    block_and_plane,
    delta_of,
    first_row,
    first_statistic,
    is_inexact,
    kept,
    load_delta,
    load_douts,
    load_lse,
    number,
    opened,
    saved_rows,
    softmax_step,
    store_rows,
    store_saved,
    typed,
    weights_of,
)
from ._philox import keep_each, keep_mixed
from ._products import add_product, row_products
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
from ._skew import Matrix, load_seen, mixed, rotated, skewed, unknown_zero


@triton.jit
def bwd_rows(
    call,
    dout,
    out,
    statistics,
    saved,
    OPTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What backward needs of every row first: see `Saved`."""
    call = typed(call)
    block, plane = block_and_plane(saved_rows(call.sizes), BLOCK_M)
    at = opened(call.sizes, plane)
    IN_ORDER: tl.constexpr = call.marks.positions is None
    SPARSE: tl.constexpr = (call.marks.key_rank is not None) or (call.mask.tensor is not None)
    first_i = block * BLOCK_M
    if first_i < tl.cdiv(at.queries, PADDED) * PADDED:
        row = first_i + tl.arange(0, BLOCK_M)
        place = statistics.tensor + (first_statistic(statistics, at) + row)
        lse = tl.load(place, mask=row < at.queries, other=INFINITY)
        delta = delta_of(dout, out, at, first_i, lse, BLOCK_M, D, BLOCK_D)
        inexact = is_inexact(lse)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        if tl.max(inexact.to(tl.int32), 0) > 0:
            readable = readable_keys(at, OPTIONS)
            hidden = hiding_ranks(call, at, OPTIONS)
            keys = Matrix(first_row(call.key, at), call.key.row, readable, hidden)
            band = Matrix(first_table_row(call.table, at), call.table.row, number(call.table.rows), None)
            lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
            queries = load_queries(call, at, lines, D, BLOCK_D, BLOCK_M)
            for first_j in range(0, end_of_keys(call, at, first_i, OPTIONS, BLOCK_M), BLOCK_N):
                j = first_j + tl.arange(0, BLOCK_N)[None, :]
                live = True
                whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
                if SPARSE:
                    live, whole = classes(
                        call, at, lines, first_j, j, lse > 0.5 * UNIFORM_SCORE, OPTIONS, BLOCK_M, BLOCK_N
                    )
                if live:
                    k = load_seen(keys, first_j, BLOCK_N, D, BLOCK_D)
                    s = skewed(
                        queries.position, band, number(call.table.offset) + first_j - lines.top,
                        lines.top - lines.position, lines.top - lines.bottom, IN_ORDER, PRECISION,
                        D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    s = tile_scores(call, at, s, queries.content, k, queries, lines, j, whole, OPTIONS, PRECISION)
                    _, _, weight, top = softmax_step(s, weight, top)
        store_saved(saved, at, row, delta, lse, inexact, weight, top)


@triton.jit
def bwd_keys(
    call,
    dout,
    saved,
    dkey,
    dvalue,
    OPTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FRESH: tl.constexpr = False,
):
    """dkey and dvalue of BLOCK_N keys."""
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.keys), BLOCK_N)
    at = opened(call.sizes, plane)
    IN_ORDER: tl.constexpr = call.marks.positions is None
    SPARSE: tl.constexpr = (call.marks.key_rank is not None) or (call.mask.tensor is not None)
    # Where that spilled, `v` is loaded again for each tile; of float32 that spilled more.
    MUCH: tl.constexpr = (call.marks.key_segments is not None) and (SPARSE or (call.dropout.seed is not None))
    RELOAD: tl.constexpr = MUCH and IN_ORDER and D > 64 and call.query.tensor.dtype.element_ty != tl.float32
    first_j = block * BLOCK_N
    if first_j < at.extent:
        readable = readable_keys(at, OPTIONS)
        hidden = hiding_ranks(call, at, OPTIONS)
        keys = Matrix(first_row(call.key, at), call.key.row, readable, hidden)
        values = Matrix(first_row(call.value, at), call.value.row, readable, hidden)
        band = Matrix(first_table_row(call.table, at), call.table.row, number(call.table.rows), None)
        if not RELOAD:
            v = load_seen(values, first_j, BLOCK_N, D, BLOCK_D)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        j = first_j + tl.arange(0, BLOCK_N)[None, :]
        low = 0
        zero = 0
        if OPTIONS.causal and not OPTIONS.uniform_rows and IN_ORDER:
            low = tl.maximum(first_j - at.shift, 0) // BLOCK_M * BLOCK_M
        for first_i in range(low, tl.where(first_j < readable, at.queries, 0), BLOCK_M):
            lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
            row = first_i + tl.arange(0, BLOCK_M)
            lse = load_lse(saved, at, row)
            live = True
            whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
            if SPARSE:
                live, whole = classes(call, at, lines, first_j, j, lse > 0.5 * UNIFORM_SCORE, OPTIONS, BLOCK_M, BLOCK_N)
            near_keys, near_band = keys, band
            if FRESH:
                zero = unknown_zero(zero, first_i)
                near_keys = Matrix(keys.base, keys.stride + zero, keys.count, keys.rank)
                near_band = Matrix(band.base, band.stride + zero, band.count, band.rank)
            if live:
                queries = load_queries(call, at, lines, D, BLOCK_D, BLOCK_M)
                delta, lse_correction = load_delta(saved, at, row)
                do = load_douts(dout, at, first_i, lse, OPTIONS.empty, BLOCK_M, D, BLOCK_D)
                k = load_seen(near_keys, first_j, BLOCK_N, D, BLOCK_D)
                s = skewed(
                    queries.position, near_band, number(call.table.offset) + first_j - lines.top,
                    lines.top - lines.position, lines.top - lines.bottom,
                    IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                s = tile_scores(call, at, s, queries.content, k, queries, lines, j, whole, OPTIONS, PRECISION)
                p = weights_of(s, lse[:, None], lse_correction[:, None])
                if RELOAD:
                    v = load_seen(values, first_j, BLOCK_N, D, BLOCK_D)
                dp = row_products(do, v, None, PRECISION)
                dropped = p
                if call.dropout.seed is not None:
                    keep = kept(call.dropout, lines.number[:, None], first_j, at, OPTIONS.tag, BLOCK_N)
                    dropped = tl.where(keep, p * call.dropout.keep_scale, 0.0)
                    dp = tl.where(keep, dp * call.dropout.keep_scale, 0.0)
                dv = add_product(tl.trans(dropped.to(do.dtype)), do, dv, PRECISION)
                g = p * (dp - delta[:, None])
                if OPTIONS.causal and OPTIONS.uniform_rows:
                    # Such a score is a constant.
                    g = tl.where(j <= lines.number[:, None] + at.shift, g, 0.0)
                dk = add_product(tl.trans(g.to(do.dtype)), queries.content, dk, PRECISION)
        store_rows(dkey, at, dk * call.scale, first_j, at.extent, BLOCK_N, D, BLOCK_D)
        store_rows(dvalue, at, dv, first_j, at.extent, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=["each"])
def bwd_table(
    call,
    dout,
    saved,
    dtable,
    each,
    OPTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of BLOCK_N rows of the table, laid out by table row: element (m, n) is of the key at distance n.

    Of the sequences that share the table a program walks `each`, and its share is a part of its own of dtable.
    """
    call = typed(call)
    # Blocks begin where keys do whose dropout is drawn together: see `rows_before` of `Stream`.
    before = 0
    if call.dropout.seed is not None and call.marks.positions is None:
        before = -number(call.table.offset) & 3
    block, share = block_and_plane(number(call.table.rows) + before, BLOCK_N)
    IN_ORDER: tl.constexpr = call.marks.positions is None
    SPARSE: tl.constexpr = (call.marks.key_rank is not None) or (call.mask.tensor is not None)
    first_p = block * BLOCK_N - before
    sequences = number(call.table.sequences)
    parts = tl.cdiv(sequences, each)
    part = share // call.sizes.heads % parts
    group = share // (call.sizes.heads * parts)
    h = share % call.sizes.heads
    # Of the first of the sequences that share the table.
    opening = opened(call.sizes, group * sequences * call.sizes.heads + h)
    band = Matrix(first_table_row(call.table, opening), call.table.row, number(call.table.rows), None)
    r = load_seen(band, first_p, BLOCK_N, D, BLOCK_D)
    dr = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    blocks = tl.cdiv(number(call.sizes.queries), BLOCK_M)
    first = part * each
    for step in range(0, (tl.minimum(first + each, sequences) - first) * blocks):
        at = opened(call.sizes, (group * sequences + first + step // blocks) * call.sizes.heads + h)
        first_i = step % blocks * BLOCK_M
        lines = query_lines(call, at, first_i, OPTIONS, BLOCK_M)
        first_j = first_p - number(call.table.offset) + lines.bottom
        readable = readable_keys(at, OPTIONS)
        hidden = hiding_ranks(call, at, OPTIONS)
        keys = Matrix(first_row(call.key, at), call.key.row, readable, hidden)
        values = Matrix(first_row(call.value, at), call.value.row, readable, hidden)
        inside = (first_i < at.queries) & (first_j < readable) & (readable > 0)
        if inside & (first_j + BLOCK_N + (lines.top - lines.bottom) > 0):
            row = first_i + tl.arange(0, BLOCK_M)
            lse = load_lse(saved, at, row)
            moved = lines.position - lines.bottom
            j = first_j + tl.arange(0, BLOCK_N)[None, :] + moved[:, None]
            live = True
            whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
            if SPARSE:
                live, whole = classes(call, at, lines, first_j, j, lse > 0.5 * UNIFORM_SCORE, OPTIONS, BLOCK_M, BLOCK_N)
            if live:
                queries = load_queries(call, at, lines, D, BLOCK_D, BLOCK_M)
                delta, lse_correction = load_delta(saved, at, row)
                do = load_douts(dout, at, first_i, lse, OPTIONS.empty, BLOCK_M, D, BLOCK_D)
                s = skewed(
                    queries.content, keys, first_j, moved, lines.top - lines.bottom,
                    IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                s = tile_scores(call, at, s, queries.position, r, queries, lines, j, whole, OPTIONS, PRECISION)
                p = weights_of(s, lse[:, None], lse_correction[:, None])
                dp = dropped_products(
                    call, at, lines, do, values, first_j, j, moved, OPTIONS, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N
                )
                g = p * (dp - delta[:, None]) * call.scale
                if OPTIONS.causal and OPTIONS.uniform_rows:
                    # Such a score is a constant.
                    g = tl.where(j <= lines.number[:, None] + at.shift, g, 0.0)
                dr = tl.dot(tl.trans(g.to(do.dtype)), queries.position, dr, input_precision=PRECISION)
    store_table_rows(call, dtable, dr, group * parts + part, h, first_p, BLOCK_N, D, BLOCK_D)


@triton.jit
def dropped_products(
    call, at, lines, do, values, first_j, j, moved, OPTIONS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every line of dout times the values that its keys, one further on with every query, have, and what dropout left.

    The bits of four keys are drawn together, before the tile is rotated: what they drop is then dropped in its order.
    """
    IN_ORDER: tl.constexpr = call.marks.positions is None
    if call.dropout.seed is not None and IN_ORDER:
        dp = mixed(do, values, first_j, moved, PRECISION, D, BLOCK_D, BLOCK_N)
        keep = keep_mixed(
            tl.load(call.dropout.seed), first_j // 4, moved[:, None], lines.number[:, None], at.number,
            OPTIONS.tag, call.dropout.threshold, BLOCK_N,
        )  # fmt: skip
        dp = rotated(tl.where(keep, dp * call.dropout.keep_scale, 0.0), moved, BLOCK_M, BLOCK_N)
    else:
        dp = skewed(
            do, values, first_j, moved, lines.top - lines.bottom,
            IN_ORDER, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if call.dropout.seed is not None:
            keep = keep_each(
                tl.load(call.dropout.seed), j, lines.number[:, None], at.number,
                OPTIONS.tag, call.dropout.threshold,
            )  # fmt: skip
            dp = tl.where(keep, dp * call.dropout.keep_scale, 0.0)
    return dp


@triton.jit
def store_table_rows(
    call, dtable, dr, part, h, first_p, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows first_p .. of one part and head of float32 `[G * parts, R, H, D]`."""
    n = first_p + tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    base = dtable + (part.to(tl.int64) * number(call.table.rows) * call.sizes.heads + h) * D
    place = base + n.to(tl.int64) * (call.sizes.heads * D) + d
    tl.store(place, dr, mask=(n >= 0) & (n < number(call.table.rows)) & (d < D))
