"""A tile of attention's scores, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._attention import INFINITY, UNSEEN_RANK, Broadcast, Rows, Sizes, first_row, load_scores, number, some
from ._philox import Dropout


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
def load_keys(rows, call, at, first_j, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first_j .. first_j + BLOCK_N - 1 of keys or values, zeros where none is or no query sees it."""
    j = first_j + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    seen = j < at.keys
    if call.key_rank is not None:
        rank = tl.load(call.key_rank + (at.b * number(call.sizes.keys) + j), mask=seen, other=UNSEEN_RANK)
        seen = seen & (rank != UNSEEN_RANK)
    inside = seen[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    place = first_row(rows, at) + tl.cast(first_j, tl.int64) * rows.row
    return tl.load(place + (tl.arange(0, BLOCK_N)[:, None] * rows.row + d[None, :]), mask=inside, other=0.0)


@triton.jit
def some_allowed(call, at, i, j):
    """Whether the mask leaves anything of a tile."""
    return some(load_scores(call.mask, at, i, j) != 0)


@triton.jit
def tile_scores(call, at, x, y, i, j, CAUSAL: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of x times y, one of them queries i and the other keys j, with the bias, -inf where i may not attend j.

    Without EDGE all keys of the tile are there, before the diagonal.
    """
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * call.scale
    if call.bias.tensor is not None:
        s += load_scores(call.bias, at, i, j).to(tl.float32)
    if call.mask.tensor is not None:
        s = tl.where(load_scores(call.mask, at, i, j) != 0, s, -INFINITY)
    if EDGE:
        s = tl.where(j < at.keys, s, -INFINITY)
        if CAUSAL:
            s = tl.where(j <= i + at.shift, s, -INFINITY)
    return s
