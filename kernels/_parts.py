"""Few queries against long keys: the keys are split over programs, and what each has found is joined in order.

    fwd   a program per (block of queries, head, part of the keys):   acc [M, D], sum of weights and largest score [M]
    join  a program per (block of queries, head):                     out and lse, from its parts one after the other

How many parts there are follows from the sizes alone, so that a sum has the same order on every device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import (
    INFINITY,
    Rows,
    Sizes,
    Statistics,
    block_and_plane,
    coded,
    decoded,
    exp,
    grid_of,
    number,
    opened,
    store_results,
    typed,
)
from ._configurations import COMPILE_OPTIONS
from ._launch import launch
from ._plan import Launch

# Where keys are split: for so few queries, from so many keys on, into parts of at least so many, until there are about
# so many programs with blocks of 64 queries.
FEW_QUERIES, MANY_KEYS, KEYS_OF_PART, PROGRAMS = 128, 1024, 512, 256
# Parts begin where tiles do, of which none has more keys.
WIDEST_TILE = 128
JOINED_ROWS = 16


class Partial(NamedTuple):
    """What the parts have found, float32.

    Attributes:
        acc: `[B * H, parts, Tq, D]`, weights times values.
        weight, top: `[B * H, parts, Tq]`, the sum of the weights and the largest score.
        parts: how many there are, `coded`.
        each: how many keys each has, `coded`; the last may have fewer.
    """

    acc: Tensor
    weight: Tensor
    top: Tensor
    parts: int
    each: int


def parts_of_keys(queries: int, keys: int, planes: int) -> tuple[int, int]:
    """How many parts so many keys of every plane are split into, and how many keys each has."""
    if queries > FEW_QUERIES or keys < MANY_KEYS:
        return 1, keys
    wanted = min(keys // KEYS_OF_PART, PROGRAMS // (planes * triton.cdiv(queries, 64)))
    each = triton.cdiv(triton.cdiv(keys, max(1, wanted)), WIDEST_TILE) * WIDEST_TILE
    return triton.cdiv(keys, each), each


def partial_of(sizes: Sizes, planes: int, query: Tensor) -> Partial | None:
    """Room for the parts of a call with these queries; None where its keys are not split, as of packed sequences."""
    queries = decoded(sizes.queries)
    parts, each = parts_of_keys(queries, decoded(sizes.keys), planes)
    if parts == 1 or sizes.cu_seqlens is not None:
        return None
    acc = torch.empty((planes, parts, queries, query.shape[-1]), dtype=torch.float32, device=query.device)
    weight, top = (torch.empty(acc.shape[:3], dtype=torch.float32, device=query.device) for _ in range(2))
    return Partial(acc, weight, top, coded(parts), coded(each))


def join_parts(partial: Partial, sizes: Sizes, out: Rows, lse: Statistics, keep_scale: float) -> Launch:
    """out and lse, from what the parts have found; the launch."""
    planes, _, queries, head_size = partial.acc.shape
    padded = max(16, triton.next_power_of_2(head_size))
    grid = grid_of(queries, JOINED_ROWS, planes)
    options: dict[str, Any] = {"D": head_size, "BLOCK_D": padded, "BLOCK_M": JOINED_ROWS, "num_warps": 4}
    options |= COMPILE_OPTIONS
    arguments = (partial, sizes, out, lse, keep_scale)
    return Launch(join, launch(join, grid, partial.acc.device, *arguments, **options), grid, arguments, options)


@triton.jit
def part_and_plane(partial, plane):
    """Which part of the keys, and which plane, a program is for: those of one plane follow each other."""
    if partial is not None:
        return plane % number(partial.parts), plane // number(partial.parts)
    else:
        return 0, plane


@triton.jit
def keys_of_part(partial, part, end):
    """The first key of a part, and where its keys end."""
    if partial is not None:
        first = part * number(partial.each)
        return first, tl.minimum(first + number(partial.each), end)
    else:
        return 0, end


@triton.jit
def store_part(
    partial, at, part, first_i, acc, weight, top, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """What the running softmax has come to at the end of a part."""
    row = first_i + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    place = (at.number * number(partial.parts) + part).to(tl.int64) * at.queries + row
    there = row < at.queries
    tl.store(partial.acc + place[:, None] * D + d[None, :], acc, mask=there[:, None] & (d < D)[None, :])
    tl.store(partial.weight + place, weight, mask=there)
    tl.store(partial.top + place, top, mask=there)


@triton.jit
def join(
    partial,
    sizes,
    out,
    lse,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out and lse of BLOCK_M queries from all parts, one after the other."""
    sizes = typed(sizes)
    block, plane = block_and_plane(number(sizes.queries), BLOCK_M)
    at = opened(sizes, plane)
    first_i = block * BLOCK_M
    row = first_i + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    there = row < at.queries
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    parts = number(partial.parts)
    for part in range(0, parts):
        place = (plane * parts + part).to(tl.int64) * at.queries + row
        inside = there[:, None] & (d < D)[None, :]
        share = tl.load(partial.acc + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        largest = tl.load(partial.top + place, mask=there, other=-INFINITY)
        above = tl.maximum(top, largest)
        # As in `softmax_step`.
        level = tl.where(above == -INFINITY, 0.0, above)
        less = exp(top - level)
        other = exp(largest - level)
        acc = acc * less[:, None] + share * other[:, None]
        weight = weight * less + tl.load(partial.weight + place, mask=there, other=0.0) * other
        top = above
    store_results(out, lse, at, first_i, acc, weight, top, keep_scale, sizes, BLOCK_M, D, BLOCK_D)
