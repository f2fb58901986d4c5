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
def _words(seed, block, row, plane, tag: tl.constexpr):
    """The four words of counters (block, row, plane, tag), each `[M, N]`."""
    block, row = tl.broadcast(block.to(tl.uint32, bitcast=True), row.to(tl.uint32, bitcast=True))
    last = tl.zeros_like(block) + tag
    return tl.philox(seed, block, row, tl.zeros_like(block) + plane.to(tl.uint32, bitcast=True), last)


@triton.jit
def _is_kept(words, threshold):
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def keep(seed, block, row, plane, tag: tl.constexpr, threshold):
    """Which elements survive: `[M, N]` for counters (block, row, plane, tag) `[M, N / 4]`, word j % 4 for column j."""
    w0, w1, w2, w3 = _words(seed, block, row, plane, tag)
    return _is_kept(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)), threshold)


@triton.jit
def keep_mixed(seed, first_block, shift, row, plane, tag: tl.constexpr, threshold, BLOCK_N: tl.constexpr):
    """`keep` for lines of which the first `shift` columns `[M, 1]` are those of the next BLOCK_N.

    Four columns that lie on both sides draw twice, once for each.
    """
    here = tl.arange(0, BLOCK_N // 4)[None, :]
    later = first_block + BLOCK_N // 4
    block = tl.where(4 * here + 4 <= shift, later, first_block) + here
    w0, w1, w2, w3 = _words(seed, block, row, plane, tag)
    split = shift // 4
    v0, v1, v2, _ = _words(seed, later + split, row, plane, tag)
    left = tl.where(here == split, shift % 4, 0)
    w0 = tl.where(left > 0, v0, w0)
    w1 = tl.where(left > 1, v1, w1)
    w2 = tl.where(left > 2, v2, w2)
    return _is_kept(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)), threshold)


@triton.jit
def keep_each(seed, column, row, plane, tag: tl.constexpr, threshold):
    """Like `keep` for columns `[M, N]` in any order: every element draws four words and takes one."""
    w0, w1, w2, w3 = _words(seed, column >> 2, row, plane, tag)
    word = tl.where((column & 2) != 0, tl.where((column & 1) != 0, w3, w2), tl.where((column & 1) != 0, w1, w0))
    return _is_kept(word, threshold)
