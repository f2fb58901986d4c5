"""attention's forward: a running softmax over the keys; see attention.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import INFINITY, block_and_plane, kept, load_rows, number, opened, softmax_step, store_results, typed
from ._attention_scores import allowed_pairs, end_of_keys, load_keys, tile_scores
from ._parts import keys_of_part, part_and_plane, store_part
from ._philox import ATTENTION


@triton.jit
def fwd(
    call,
    out,
    lse,
    partial,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out and lse of BLOCK_M queries; with a record of parts what one part of the keys adds to them."""
    call = typed(call)
    block, plane = block_and_plane(number(call.sizes.queries), BLOCK_M)
    part, plane = part_and_plane(partial, plane)
    at = opened(call.sizes, plane)
    first_i = block * BLOCK_M
    if first_i < at.queries:
        q = load_rows(call.query, at, first_i, at.queries, BLOCK_M, D, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        # Whole tiles first, then those on an edge: the end of the keys, or the diagonal.
        low, high = keys_of_part(partial, part, end_of_keys(at, first_i, CAUSAL, BLOCK_M))
        whole = at.keys // BLOCK_N * BLOCK_N
        if CAUSAL:
            whole = tl.minimum(whole, tl.maximum(first_i + 1 + at.shift, 0) // BLOCK_N * BLOCK_N)
        middle = tl.maximum(low, tl.minimum(whole, high))
        acc, weight, top = _walk(
            call, at, q, acc, weight, top, first_i, low, middle, CAUSAL, False, PRECISION, D, BLOCK_D, BLOCK_N
        )
        acc, weight, top = _walk(
            call, at, q, acc, weight, top, first_i, middle, high, CAUSAL, True, PRECISION, D, BLOCK_D, BLOCK_N
        )
        if partial is not None:
            store_part(partial, at, part, first_i, acc, weight, top, BLOCK_M, D, BLOCK_D)
        else:
            factor = call.dropout.keep_scale
            store_results(out, lse, at, first_i, acc, weight, top, factor, call.sizes, BLOCK_M, D, BLOCK_D)


@triton.jit
def _walk(
    call, at, q, acc, weight, top, first_i, low, high, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys low .. high - 1: acc, the sum of weights and the largest score of each row."""
    i = first_i + tl.arange(0, q.shape[0])[:, None]
    for first_j in range(low, high, BLOCK_N):
        j = first_j + tl.arange(0, BLOCK_N)[None, :]
        pairs = allowed_pairs(call, at, i, j, EDGE)
        if call.mask.tensor is None or pairs > 0:
            k = load_keys(call.key, call, at, first_j, EDGE, BLOCK_N, D, BLOCK_D)
            s = tile_scores(call, at, q, k, i, j, pairs, EDGE, EDGE, CAUSAL, PRECISION)
            p, less, weight, top = softmax_step(s, weight, top)
            if call.dropout.seed is not None:
                p = tl.where(kept(call.dropout, i, first_j, at, ATTENTION, BLOCK_N), p, 0.0)
            v = load_keys(call.value, call, at, first_j, EDGE, BLOCK_N, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * less[:, None], input_precision=PRECISION)
    return acc, weight, top
