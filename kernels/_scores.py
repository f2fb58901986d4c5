"""What the attention kernels share: sequences, tiles of rows, masks and biases of a tile of scores, dropout's bits.

i numbers queries, j keys, both within their sequence; a tile has them as `[BLOCK_M, 1]` and `[1, BLOCK_N]`, or the
other way round where it is transposed.

Scores are rounded before the largest, or lse, is subtracted: where one key outweighs all others, lse is its score to
the last bit, and its weight in backward exactly 1, however large the scores are.  A base of 2 from the start or a
multiplication fused with the subtraction would lose that, so kernels of scores are compiled without fused
multiply-add (products of tiles are not touched by it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._philox import keep

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


# A tile has at most 128 rows.
FAR = 2**31 // 128


class Rows(NamedTuple):
    """`[B, T, H, D]`, or packed `[total, H, D]`, as an address with strides over sequence, row and head."""

    tensor: Tensor
    batch: int
    row: int
    head: int


def rows_of(x: Tensor) -> Rows:
    """x in place where its last dimension is contiguous, else a copy; a packed tensor's batch stride is 0.

    Within a tile rows are counted in 32 bits: those too far apart are copied too.
    """
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or (x.shape[-3] > 1 and x.stride(-3) >= FAR):
        x = x.contiguous()
    strides = x.stride()
    return Rows(x, *strides[:3]) if x.dim() == 4 else Rows(x, 0, *strides[:2])


def strides_of_statistics(lse: Tensor) -> tuple[int, int]:
    """lse `[B, H, Tq]` or packed `[H, total]`: strides over sequence and head."""
    return (lse.stride(0), lse.stride(1)) if lse.dim() == 3 else (0, lse.stride(0))


class Broadcast(NamedTuple):
    """A mask or bias as an address with strides over B, H, Tq and Tk, 0 along what is broadcast."""

    tensor: Tensor | None
    strides: tuple[int, int, int, int]


def broadcast_of(x: Tensor | None) -> Broadcast:
    """Of a tensor that broadcasts to `[B, H, Tq, Tk]`, or None; a boolean one as bytes."""
    if x is None:
        return Broadcast(None, (0, 0, 0, 0))
    strides = tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return Broadcast(x.view(torch.uint8) if x.dtype is torch.bool else x, strides)


def precision_of(dtype: torch.dtype) -> str:
    """How products of float32 tiles are computed: as float32, unless torch may round to tf32."""
    return "tf32" if dtype is torch.float32 and _may_round() else "ieee"


def _may_round() -> bool:
    matmul = torch.backends.cuda.matmul
    # Once the newer name was set the older one raises; the newer one knows what either was set to.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def grid_of(rows: int, block: int, planes: int) -> tuple[int]:
    """The grid of kernels that begin with `block_and_plane`."""
    return (triton.cdiv(rows, block) * planes,)


@triton.jit
def block_and_plane(rows, BLOCK: tl.constexpr):
    """Which block of so many rows, and which plane (a sequence's head), this program is for.

    Programs are on the grid's first axis, which takes 2^31 - 1 where the others end at 65,535; those of one plane
    follow each other, so that they find its keys in the cache.
    """
    blocks = tl.cdiv(rows, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def sequence(cu_seqlens, key_lengths, b, queries, keys, total, most):
    """Sequence b: its first row, its queries and keys, and whether the numbers that say so are wrong.

    Wrong numbers are brought into range, so that nothing outside is read, and the rows become NaN.
    """
    start = 0
    wrong = False
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b)
        last = tl.load(cu_seqlens + b + 1)
        start = tl.minimum(tl.maximum(first, 0), total)
        queries = tl.minimum(tl.maximum(last, start), total) - start
        keys = queries
        wrong = (first < 0) | (last < first) | (last > total) | (queries > most)
    if key_lengths is not None:
        length = tl.load(key_lengths + b)
        wrong = (length < 0) | (length > keys)
        keys = tl.minimum(tl.maximum(length, 0), keys)
    return tl.cast(start, tl.int64), queries, keys, wrong


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def load_rows(base, first, count, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first .. first + BLOCK - 1 of a `[count, D]` matrix: `[BLOCK, BLOCK_D]` with zeros outside."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (first + n < count)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    place = base + tl.cast(first, tl.int64) * stride
    return tl.load(place + (n[:, None] * stride + d[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(base, x, first, count, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `load_rows`; x is rounded to what `base` points to."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (first + n < count)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    place = base + tl.cast(first, tl.int64) * stride
    tl.store(place + (n[:, None] * stride + d[None, :]), x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_scores(base, i, j, queries, keys, i_stride, j_stride):
    """The tile of a mask or bias at (i, j), zeros outside."""
    place = base + (i.to(tl.int64) * i_stride + j.to(tl.int64) * j_stride)
    return tl.load(place, mask=(i < queries) & (j < keys), other=0)


@triton.jit
def some(tile):
    """Whether any element of a tile `[M, N]` of booleans is true."""
    return tl.max(tl.max(tile.to(tl.int32), 1), 0) != 0


@triton.jit
def some_allowed(mask, i, j, queries, keys, i_stride, j_stride):
    """Whether anything in the tile of a mask at (i, j) may be attended."""
    return some(load_scores(mask, i, j, queries, keys, i_stride, j_stride) != 0)


@triton.jit
def kept(seed, first_i, first_j, plane, threshold, tag: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of the tile at (first_i, first_j) survive dropout, `[BLOCK_M, BLOCK_N]`."""
    block = first_j // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    row = first_i + tl.arange(0, BLOCK_M)[:, None]
    return keep(tl.load(seed), block, row, plane, tag, threshold)
