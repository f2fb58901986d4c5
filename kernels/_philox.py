"""Dropout's bits: Philox 4x32-10 with the counters of `pyxlbert.reference.philox`, the same on every backend.

Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# `Tag` of pyxlbert.reference.philox: the last counter word.
ATTENTION = tl.constexpr(1)
RELATIVE_ATTENTION = tl.constexpr(2)
QUERY_STREAM = tl.constexpr(3)
DROPOUT_ADD_LAYER_NORM = tl.constexpr(4)
EMBEDDING_LAYER_NORM = tl.constexpr(5)


class Dropout(NamedTuple):
    """A seed `[1]` or None, what words of random bits are compared with, and the factor of what is kept."""

    seed: Tensor | None
    threshold: int
    keep_scale: float


def dropout_of(dropout_p: float, seed: Tensor | None) -> Dropout:
    """Without dropout there is no seed."""
    return Dropout(None if dropout_p == 0.0 else seed, *dropout_numbers(dropout_p))


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """What a kernel compares words with, shifted into the range of int32, and the factor of what is kept."""
    if dropout_p >= 1.0:
        return 2**31 - 1, 0.0
    return math.floor(dropout_p * 2**32) - 2**31, 1.0 / (1.0 - dropout_p)


@triton.jit
def keep(seed, block, row, plane, tag: tl.constexpr, threshold):
    """Which elements survive: `[M, N]` for counters (block, row, plane, tag) `[M, N / 4]`, word j % 4 for column j."""
    block, row = tl.broadcast(block.to(tl.uint32, bitcast=True), row.to(tl.uint32, bitcast=True))
    last = tl.zeros_like(block) + tag
    w0, w1, w2, w3 = tl.philox(seed, block, row, tl.zeros_like(block) + plane.to(tl.uint32, bitcast=True), last)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def keep_each(seed, column, row, plane, tag: tl.constexpr, threshold):
    """Like `keep` for columns `[M, N]` in any order: every element draws four words and takes one."""
    column, row = tl.broadcast(column, row)
    block = (column >> 2).to(tl.uint32, bitcast=True)
    last = tl.zeros_like(block) + tag
    fixed = tl.zeros_like(block) + plane.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, block, row.to(tl.uint32, bitcast=True), fixed, last)
    word = tl.where((column & 2) != 0, tl.where((column & 1) != 0, w3, w2), tl.where((column & 1) != 0, w1, w0))
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
