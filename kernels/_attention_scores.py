"""A tile of attention's scores, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._attention import INFINITY, UNSEEN_RANK, Broadcast, Rows, Sizes, count, first_row, load_scores, number
from ._philox import Dropout
from ._products import row_products

# Beside a mask, a bias or dropout rows of more float32 are multiplied in pieces: whole ones do not fit the registers.
LONG = tl.constexpr(128)


class Call(NamedTuple):
    """What every kernel begins with: a call of the op, forward or backward.

    Attributes:
        key_rank: int32 `[B, Tk]` beside a mask: UNSEEN_RANK, of keys that it hides from all queries, or less.
    """

    query: Rows
    key: Rows
    value: Rows
    mask: Broadcast
    key_rank: Tensor | None
    bias: Broadcast
    sizes: Sizes
    scale: float
    dropout: Dropout


@triton.jit
def end_of_keys(at, first_i, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the keys of BLOCK_M queries end: at the diagonal, or at the sequence's end."""
    high = at.keys
    if CAUSAL:
        high = tl.minimum(high, tl.maximum(first_i + BLOCK_M + at.shift, 0))
    return high


class BiasGradient(NamedTuple):
    """dbias, contiguous, and its sizes: 1 along what the bias is broadcast; and the number of sequences.

    All are `coded` but the number of columns, which a row of wide stores depends on.
    """

    tensor: Tensor
    batch: int
    heads: int
    rows: int
    columns: int
    sequences: int


@triton.jit
def load_keys(
    rows, call, at, first_j, EDGE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows first_j .. first_j + BLOCK_N - 1 of keys or values, zeros where none is or no query sees it.

    Without EDGE all of them are there.
    """
    j = first_j + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    place = first_row(rows, at) + tl.cast(first_j, tl.int64) * rows.row
    place = place + (tl.arange(0, BLOCK_N)[:, None] * rows.row + d[None, :])
    if not EDGE and call.key_rank is None and D == BLOCK_D:
        return tl.load(place)
    else:
        seen = j < at.keys
        if call.key_rank is not None:
            rank = tl.load(call.key_rank + (at.b * number(call.sizes.keys) + j), mask=seen, other=UNSEEN_RANK)
            seen = seen & (rank != UNSEEN_RANK)
        inside = seen[:, None]
        if D != BLOCK_D:
            inside = inside & (d < D)[None, :]
        return tl.load(place, mask=inside, other=0.0)


@triton.jit
def allowed_pairs(call, at, i, j, EDGE: tl.constexpr = True):
    """How many elements of a tile the mask leaves, keys past the length among them; without a mask 1."""
    if call.mask.tensor is not None:
        return count(load_scores(call.mask, at, i, j, EDGE) != 0)
    else:
        return 1


@triton.jit
def is_edge(at, first_i, first_j, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether some of BLOCK_N keys are not there, or stand behind the diagonal of query first_i or a later one."""
    edge = first_j + BLOCK_N > at.keys
    if CAUSAL:
        edge = edge | (first_j + BLOCK_N - 1 > first_i + at.shift)
    return edge


@triton.jit
def tile_scores(
    call, at, x, y, i, j, pairs, edge, EDGE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Scores of x times y, one of them queries i and the other keys j, with the bias, -inf where i may not attend j.

    Nothing is masked of a tile of which the mask leaves all `pairs`, nor of one that is no `edge`: without EDGE it is
    known when compiling that it is none.
    """
    EXTRAS: tl.constexpr = (
        (call.mask.tensor is not None) or (call.bias.tensor is not None) or (call.dropout.seed is not None)
    )
    s = row_products(x, y, None, PRECISION, MOST=LONG if EXTRAS else x.shape[1]) * call.scale
    if call.bias.tensor is not None:
        s += load_scores(call.bias, at, i, j, EDGE).to(tl.float32)
    if call.mask.tensor is not None and pairs < s.shape[0] * s.shape[1]:
        s = tl.where(load_scores(call.mask, at, i, j, EDGE) != 0, s, -INFINITY)
    if edge:
        s = tl.where(j < at.keys, s, -INFINITY)
        if CAUSAL:
            s = tl.where(j <= i + at.shift, s, -INFINITY)
    return s
