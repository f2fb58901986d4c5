"""attention's backward from lse alone; see attention.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    INFINITY,
    PADDED,
    block_and_plane,
    delta_of,
    first_statistic,
    is_inexact,
    kept,
    load_delta,
    load_douts,
    load_lse,
    load_rows,
    number,
    opened,
    saved_rows,
    softmax_step,
    store_rows,
    store_saved,
    typed,
    weights_of,
)
from ._attention_scores import allowed_pairs, end_of_keys, is_edge, load_keys, tile_scores
from ._philox import ATTENTION


@triton.jit
def bwd_rows(
    call,
    dout,
    out,
    statistics,
    saved,
    CAUSAL: tl.constexpr,
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
    first_i = block * BLOCK_M
    if first_i < tl.cdiv(at.queries, PADDED) * PADDED:
        i = first_i + tl.arange(0, BLOCK_M)
        place = statistics.tensor + (first_statistic(statistics, at) + i)
        lse = tl.load(place, mask=i < at.queries, other=INFINITY)
        delta = delta_of(dout, out, at, first_i, lse, BLOCK_M, D, BLOCK_D)
        inexact = is_inexact(lse)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        if tl.max(inexact.to(tl.int32), 0) > 0:
            q = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D)
            for first_j in range(0, end_of_keys(at, first_i, CAUSAL, BLOCK_M), BLOCK_N):
                j = first_j + tl.arange(0, BLOCK_N)[None, :]
                pairs = allowed_pairs(call, at, i[:, None], j)
                if call.mask.tensor is None or pairs > 0:
                    k = load_keys(call.key, call, at, first_j, True, BLOCK_N, D, BLOCK_D)
                    s = tile_scores(call, at, q, k, i[:, None], j, pairs, True, True, CAUSAL, PRECISION)
                    _, _, weight, top = softmax_step(s, weight, top)
        store_saved(saved, at, i, delta, lse, inexact, weight, top)


@triton.jit
def bwd_keys(
    call,
    dout,
    saved,
    dkey,
    dvalue,
    CAUSAL: tl.constexpr,
    EMPTY: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dkey and dvalue of BLOCK_N keys.  Tiles are transposed, `[BLOCK_N, BLOCK_M]`, so that both products take them."""
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.keys), BLOCK_N)
    at = opened(call.sizes, plane)
    first_j = block * BLOCK_N
    if first_j < at.extent:
        k = load_keys(call.key, call, at, first_j, True, BLOCK_N, D, BLOCK_D)
        v = load_keys(call.value, call, at, first_j, True, BLOCK_N, D, BLOCK_D)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        j = first_j + tl.arange(0, BLOCK_N)[:, None]
        low = 0
        if CAUSAL:
            low = tl.maximum(first_j - at.shift, 0) // BLOCK_M * BLOCK_M
        for first_i in range(low, tl.where(first_j < at.keys, at.queries, 0), BLOCK_M):
            i = first_i + tl.arange(0, BLOCK_M)
            pairs = allowed_pairs(call, at, i[None, :], j)
            if call.mask.tensor is None or pairs > 0:
                lse = load_lse(saved, at, i)
                delta, lse_correction = load_delta(saved, at, i)
                q = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D)
                do = load_douts(dout, at, first_i, lse, EMPTY, BLOCK_M, D, BLOCK_D)
                edge = is_edge(at, first_i, first_j, CAUSAL, BLOCK_N)
                s = tile_scores(call, at, k, q, i[None, :], j, pairs, edge, True, CAUSAL, PRECISION)
                p = weights_of(s, lse[None, :], lse_correction[None, :])
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                dropped = p
                if call.dropout.seed is not None:
                    keep = tl.trans(kept(call.dropout, i[:, None], first_j, at, ATTENTION, BLOCK_N))
                    dropped = tl.where(keep, p * call.dropout.keep_scale, 0.0)
                    dp = tl.where(keep, dp * call.dropout.keep_scale, 0.0)
                dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        store_rows(dkey, at, dk * call.scale, first_j, at.extent, BLOCK_N, D, BLOCK_D)
        store_rows(dvalue, at, dv, first_j, at.extent, BLOCK_N, D, BLOCK_D)


@triton.jit
def _tile_gradient(
    call, at, q, do, first_i, first_j, pairs, lse, delta, lse_correction,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of scores `[BLOCK_M, BLOCK_N]`, and its keys."""
    i = first_i + tl.arange(0, q.shape[0])[:, None]
    j = first_j + tl.arange(0, BLOCK_N)[None, :]
    k = load_keys(call.key, call, at, first_j, True, BLOCK_N, D, BLOCK_D)
    v = load_keys(call.value, call, at, first_j, True, BLOCK_N, D, BLOCK_D)
    edge = is_edge(at, first_i, first_j, CAUSAL, BLOCK_N)
    s = tile_scores(call, at, q, k, i, j, pairs, edge, True, CAUSAL, PRECISION)
    p = weights_of(s, lse[:, None], lse_correction[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if call.dropout.seed is not None:
        dp = tl.where(kept(call.dropout, i, first_j, at, ATTENTION, BLOCK_N), dp * call.dropout.keep_scale, 0.0)
    return p * (dp - delta[:, None]), k


@triton.jit
def bwd_queries(
    call,
    dout,
    saved,
    dquery,
    CAUSAL: tl.constexpr,
    EMPTY: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dquery of BLOCK_M queries."""
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.queries), BLOCK_M)
    at = opened(call.sizes, plane)
    first_i = block * BLOCK_M
    if first_i < at.queries:
        i = first_i + tl.arange(0, BLOCK_M)
        lse = load_lse(saved, at, i)
        delta, lse_correction = load_delta(saved, at, i)
        q = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D)
        do = load_douts(dout, at, first_i, lse, EMPTY, BLOCK_M, D, BLOCK_D)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first_j in range(0, end_of_keys(at, first_i, CAUSAL, BLOCK_M), BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)[None, :]
            pairs = allowed_pairs(call, at, i[:, None], j)
            if call.mask.tensor is None or pairs > 0:
                ds, k = _tile_gradient(
                    call, at, q, do, first_i, first_j, pairs, lse, delta, lse_correction,
                    CAUSAL, PRECISION, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_rows(dquery, at, dq * call.scale, first_i, at.queries, BLOCK_M, D, BLOCK_D)


@triton.jit
def bwd_bias(
    call,
    dout,
    saved,
    dbias,
    CAUSAL: tl.constexpr,
    EMPTY: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of dbias: the tiles of ds that it was added to, over sequences, heads, queries and keys, one by one."""
    call = typed(call)
    across = tl.cdiv(dbias.columns, BLOCK_N)
    rows = number(dbias.rows)
    down = tl.cdiv(rows, BLOCK_M)
    at_j = tl.program_id(0) % across * BLOCK_N
    at_i = tl.program_id(0) // across % down * BLOCK_M
    at_plane = tl.program_id(0) // (across * down)
    heads = number(dbias.heads)
    at_b = at_plane // heads
    at_h = at_plane % heads
    # How many of each there are to add up: 1 where the bias has that dimension.
    queries = number(call.sizes.queries)
    keys = number(call.sizes.keys)
    sequences = tl.where(dbias.batch == dbias.sequences, 1, number(dbias.sequences))
    planes = tl.where(heads == call.sizes.heads, 1, call.sizes.heads)
    tiles_i = tl.where(rows == queries, 1, tl.cdiv(queries, BLOCK_M))
    tiles_j = tl.where(dbias.columns == keys, 1, tl.cdiv(keys, BLOCK_N))
    # `lost` is what the sum is too large by: see csrc/cpu/sums.h.
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, sequences * planes * tiles_i * tiles_j):
        first_j = at_j + step % tiles_j * BLOCK_N
        left = step // tiles_j
        first_i = at_i + left % tiles_i * BLOCK_M
        left = left // tiles_i
        at = opened(call.sizes, (at_b + left // planes) * call.sizes.heads + at_h + left % planes)
        i = first_i + tl.arange(0, BLOCK_M)
        j = first_j + tl.arange(0, BLOCK_N)[None, :]
        pairs = allowed_pairs(call, at, i[:, None], j)
        if call.mask.tensor is None or pairs > 0:
            lse = load_lse(saved, at, i)
            delta, lse_correction = load_delta(saved, at, i)
            q = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D)
            do = load_douts(dout, at, first_i, lse, EMPTY, BLOCK_M, D, BLOCK_D)
            ds, _k = _tile_gradient(
                call, at, q, do, first_i, first_j, pairs, lse, delta, lse_correction,
                CAUSAL, PRECISION, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            wanted = ds - lost
            more = sum + wanted
            excess = (more - sum) - wanted
            lost = tl.where(tl.abs(excess) < INFINITY, excess, 0.0)
            sum = more
    base = dbias.tensor + (at_plane.to(tl.int64) * rows) * dbias.columns
    i = at_i + tl.arange(0, BLOCK_M)[:, None]
    j = at_j + tl.arange(0, BLOCK_N)[None, :]
    # A dimension of one gets the sum of all tiles' rows or columns, and the other is stored as it is.
    one_row = tl.sum(sum, 0)[None, :]
    one_column = tl.sum(sum, 1)[:, None]
    if (rows == queries) & (dbias.columns == keys):
        place = base + i.to(tl.int64) * dbias.columns + j
        inside = (i < rows) & (j < dbias.columns)
        tl.store(place, sum.to(dbias.tensor.dtype.element_ty), mask=inside)
    elif dbias.columns == keys:
        tl.store(base + j, one_row.to(dbias.tensor.dtype.element_ty), mask=j < dbias.columns)
    elif rows == queries:
        tl.store(base + i.to(tl.int64), one_column.to(dbias.tensor.dtype.element_ty), mask=i < rows)
    else:
        both = tl.sum(one_row, 1)[:, None]
        tl.store(base + tl.zeros((1, 1), tl.int32), both.to(dbias.tensor.dtype.element_ty))
