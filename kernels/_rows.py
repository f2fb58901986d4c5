"""Tiles of rows: how many at a time, and the sums over all rows that backward needs.

A program takes BLOCK_M rows, whole: N columns padded to BLOCK_N, a power of two.  Of memory-bound kernels nothing else
matters much as long as enough bytes are in flight: tiles hold some 4096 elements, 32 for a thread, 16 where sums over
rows take registers too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import rows

from ._launch import launch

_TILE = 4096  # elements
_MOST_PARTS = 512  # partial sums over rows, each of them a row to write and to read again
_FEWEST_PARTS = 64  # of so many rows each that a program's sums stay short, however many blocks of columns there are
_SUMMED_COLUMNS = 16  # of a program, 64 bytes of a part: few, so that there are programs for every processor


class Tile(NamedTuple):
    """BLOCK_M, BLOCK_N and the number of warps that share a tile."""

    rows: int
    columns: int
    warps: int


class Strided(NamedTuple):
    """`[M, N]` as an address and the stride of its rows; or None and 0."""

    tensor: Tensor | None
    stride: int


class Statistics(NamedTuple):
    """float32 `[M]`: a row's mean, and the reciprocal of its standard deviation; or None."""

    mean: Tensor | None
    rstd: Tensor | None


def strided(x: Tensor | None) -> Strided:
    """Rows of x in place where its last dimension is contiguous, else a copy of it."""
    return Strided(None, 0) if x is None else Strided(*rows(x))


def tile_of(columns: int, each: int = 32) -> Tile:
    """The tile for rows of so many columns, with about so many elements for each thread."""
    width = triton.next_power_of_2(columns)
    height = max(1, min(16, _TILE // width))
    return Tile(height, width, max(1, min(16, height * width // (32 * each))))


def parts_of(rows: int, tile: Tile, blocks: int = 1) -> tuple[int, int]:
    """How many programs sum over rows, and how many rows each of them takes, a multiple of the tile's.

    With columns in several blocks there are as many programs for each of these.  Both numbers follow from the sizes
    alone, so that a sum has the same order on every device.
    """
    most = max(_FEWEST_PARTS, _MOST_PARTS // blocks)
    each = max(1, -(-rows // (most * tile.rows))) * tile.rows
    return -(-rows // each), each


class Outs(NamedTuple):
    """What sums over rows are rounded to and stored in, `[N]` each; None behind the last."""

    first: Tensor
    second: Tensor | None = None
    third: Tensor | None = None


def partial_sums(parts: int, columns: int, sums: int, device: torch.device) -> Tensor | None:
    """float32 `[sums, parts, N]`, not initialised; None where there is no sum."""
    return torch.empty(sums, parts, columns, dtype=torch.float32, device=device) if sums else None


def sum_parts(partial: Tensor | None, *outs: Tensor) -> None:
    """outs `[N]` = the sums of partial `[sums, parts, N]`, in one launch, in an order that follows from the sizes."""
    if partial is None:
        return
    sums, parts, columns = partial.shape
    grid = (sums * triton.cdiv(columns, _SUMMED_COLUMNS),)
    sizes = {"BLOCK_P": 128, "BLOCK_N": _SUMMED_COLUMNS}
    launch(_sum_parts, grid, partial.device, partial, Outs(*outs), parts, columns, **sizes, num_warps=4)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts(partial, outs, parts, columns, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(columns, BLOCK_N)
    number = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < columns
    base = partial + number.to(tl.int64) * parts * columns
    shares = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        taken = (part < parts)[:, None] & inside[None, :]
        shares += tl.load(base + part[:, None].to(tl.int64) * columns + column[None, :], mask=taken, other=0.0)
    total = tl.sum(shares, 0)
    tl.store(outs.first + column, total.to(outs.first.dtype.element_ty), mask=inside & (number == 0))
    if outs.second is not None:
        tl.store(outs.second + column, total.to(outs.second.dtype.element_ty), mask=inside & (number == 1))
    if outs.third is not None:
        tl.store(outs.third + column, total.to(outs.third.dtype.element_ty), mask=inside & (number == 2))


@triton.jit
def wide_program():
    """This program's number in 64 bits: there may be more rows than 32 count."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def load_tile(x, row, inside, BLOCK_N: tl.constexpr):
    """A tile of rows `[M, 1]`, int64, in float32, zeros outside."""
    place = x.tensor + row * x.stride + tl.arange(0, BLOCK_N)[None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_parameter(x, columns, BLOCK_N: tl.constexpr):
    """A parameter `[N]` in float32, zeros outside."""
    column = tl.arange(0, BLOCK_N)
    return tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def load_statistics(statistics, row, count):
    """mean and rstd of rows `[M]`, zeros outside."""
    mean = tl.load(statistics.mean + row, mask=row < count, other=0.0)
    return mean, tl.load(statistics.rstd + row, mask=row < count, other=0.0)


@triton.jit
def store_statistics(statistics, row, count, mean, rstd):
    """The counterpart of `load_statistics`."""
    tl.store(statistics.mean + row, mean, mask=row < count)
    tl.store(statistics.rstd + row, rstd, mask=row < count)
