"""Tile sizes, warps and pipeline stages of the attention kernels, by kernel, architecture, dtype and head size.

A table and not a search in the user's first call.  Its rows were found by compiling: of several tiles one of the first
that need no spills on the architecture, and no more shared memory than its cards have.  None has been timed yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ._cards import SMALL_SHARED, Card, card, holds_for
from ._launch import INTERPRETED, refusal


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, the warps that share them, and how many loads are under way at once.

    CARRY, where a kernel has that choice: whether one tile's products with the band are kept for the next.  maxnreg:
    the registers that a thread may have.  255 are all there are; told nothing ptxas takes what it thinks best, and
    spills a few of them to let one more block run beside, or needs fewer and spills none.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    CARRY: bool | None = None
    maxnreg: int | None = 255

    def constants(self) -> dict[str, int | bool]:
        """What is given to the kernel, and to the compiler."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if torch.version.hip is not None:
            given.pop("maxnreg", None)
        return given


class Key(NamedTuple):
    """What a row of the table is for.

    Attributes:
        kernel: its name.
        architecture: compute capability times ten; the row holds from it up to the next one of the same kind, for
            cards with as much shared memory as those of this architecture (see `holds_for`).
        bytes: of an element.
        head_size: the largest that the row is for; a smaller one without rows of its own takes the row too.
        extras: with a mask, a bias, ranks or dropout, which take registers of their own.
        segments: with the term of segments, whose registers are many.  Such a row is for calls without it too, where
            the kernel has none for them at this head size.
    """

    kernel: str
    architecture: int
    bytes: int
    head_size: int
    extras: bool
    segments: bool = False


HEAD_SIZES = (32, 64, 96, 128, 256)

TABLE: dict[Key, Tile] = {
    Key("attention_bwd_bias", 80, 4, 64, True): Tile(32, 32, 4, 1),
    Key("attention_bwd_bias", 80, 4, 128, True): Tile(32, 32, 4, 1),
    Key("attention_bwd_bias", 86, 4, 128, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_bias", 80, 4, 256, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_bias", 86, 4, 256, True): Tile(32, 16, 4, 1),
    Key("attention_bwd_bias", 90, 4, 256, True): Tile(32, 16, 8, 1),
    Key("attention_bwd_bias", 120, 4, 256, True): Tile(32, 16, 8, 1),
    Key("attention_bwd_bias", 80, 2, 64, True): Tile(32, 64, 4, 1),
    Key("attention_bwd_bias", 90, 2, 64, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_bias", 80, 2, 128, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_bias", 90, 2, 128, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_bias", 80, 2, 256, True): Tile(16, 32, 8, 1),
    Key("attention_bwd_bias", 100, 2, 256, True): Tile(64, 32, 8, 1),
    Key("attention_bwd_keys", 80, 4, 64, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_keys", 80, 4, 64, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_keys", 86, 4, 96, False): Tile(32, 16, 4, 1),
    Key("attention_bwd_keys", 80, 4, 128, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_keys", 86, 4, 128, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_keys", 90, 4, 128, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_keys", 100, 4, 128, False): Tile(32, 16, 8, 1),
    Key("attention_bwd_keys", 80, 4, 128, True): Tile(16, 16, 8, 1),
    Key("attention_bwd_keys", 80, 4, 256, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_keys", 86, 4, 256, False): Tile(32, 16, 8, 1),
    Key("attention_bwd_keys", 80, 4, 256, True): Tile(16, 16, 8, 1),
    Key("attention_bwd_keys", 80, 2, 32, True): Tile(32, 64, 4, 1),
    Key("attention_bwd_keys", 90, 2, 32, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_keys", 100, 2, 32, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_keys", 80, 2, 64, False): Tile(32, 64, 4, 1),
    Key("attention_bwd_keys", 90, 2, 64, False): Tile(64, 128, 8, 3),
    Key("attention_bwd_keys", 100, 2, 64, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_keys", 80, 2, 64, True): Tile(64, 32, 8, 1),
    Key("attention_bwd_keys", 90, 2, 64, True): Tile(32, 64, 4, 1),
    Key("attention_bwd_keys", 100, 2, 64, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_keys", 80, 2, 96, False): Tile(64, 64, 8, 1),
    Key("attention_bwd_keys", 90, 2, 96, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_keys", 100, 2, 96, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_keys", 100, 2, 96, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_keys", 80, 2, 128, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_keys", 86, 2, 128, False): Tile(64, 64, 8, 1),
    Key("attention_bwd_keys", 100, 2, 128, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_keys", 80, 2, 128, True): Tile(32, 64, 8, 1),
    Key("attention_bwd_keys", 90, 2, 128, True): Tile(64, 32, 8, 1),
    Key("attention_bwd_keys", 100, 2, 128, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_keys", 80, 2, 256, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_keys", 90, 2, 256, False): Tile(64, 32, 8, 1),
    Key("attention_bwd_keys", 100, 2, 256, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_keys", 80, 2, 256, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_keys", 86, 2, 256, True): Tile(16, 32, 8, 1),
    Key("attention_bwd_keys", 90, 2, 256, True): Tile(64, 32, 8, 1),
    Key("attention_bwd_queries", 80, 4, 64, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_queries", 80, 4, 64, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_queries", 120, 4, 64, True): Tile(32, 16, 4, 1),
    Key("attention_bwd_queries", 80, 4, 128, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_queries", 120, 4, 128, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_queries", 80, 4, 128, True): Tile(16, 16, 8, 1),
    Key("attention_bwd_queries", 80, 4, 256, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_queries", 86, 4, 256, False): Tile(32, 16, 4, 1),
    Key("attention_bwd_queries", 100, 4, 256, False): Tile(32, 16, 8, 1),
    Key("attention_bwd_queries", 80, 4, 256, True): Tile(16, 16, 8, 1),
    Key("attention_bwd_queries", 80, 2, 64, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_queries", 90, 2, 64, False): Tile(128, 64, 8, 3),
    Key("attention_bwd_queries", 100, 2, 64, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_queries", 80, 2, 64, True): Tile(32, 64, 4, 1),
    Key("attention_bwd_queries", 90, 2, 64, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_queries", 80, 2, 128, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_queries", 90, 2, 128, False): Tile(128, 64, 8, 3),
    Key("attention_bwd_queries", 100, 2, 128, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_queries", 80, 2, 128, True): Tile(32, 64, 4, 1),
    Key("attention_bwd_queries", 100, 2, 128, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_queries", 80, 2, 256, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_queries", 86, 2, 256, False): Tile(32, 64, 8, 1),
    Key("attention_bwd_queries", 90, 2, 256, False): Tile(32, 64, 8, 1),
    Key("attention_bwd_queries", 100, 2, 256, False): Tile(64, 64, 8, 2),
    Key("attention_bwd_queries", 80, 2, 256, True): Tile(32, 64, 8, 1),
    Key("attention_bwd_queries", 100, 2, 256, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_rows", 80, 4, 64, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_rows", 80, 4, 64, True): Tile(32, 32, 8, 1),
    Key("attention_bwd_rows", 80, 4, 128, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_rows", 90, 4, 128, False): Tile(32, 16, 8, 1),
    Key("attention_bwd_rows", 120, 4, 128, False): Tile(32, 16, 8, 1),
    Key("attention_bwd_rows", 80, 4, 128, True): Tile(16, 16, 8, 1),
    Key("attention_bwd_rows", 80, 4, 256, False): Tile(32, 32, 4, 1),
    Key("attention_bwd_rows", 100, 4, 256, False): Tile(32, 32, 8, 1),
    Key("attention_bwd_rows", 80, 4, 256, True): Tile(16, 16, 8, 1),
    Key("attention_bwd_rows", 80, 2, 64, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_rows", 80, 2, 64, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_rows", 80, 2, 128, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_rows", 80, 2, 128, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_rows", 120, 2, 128, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_rows", 80, 2, 256, False): Tile(64, 64, 4, 2),
    Key("attention_bwd_rows", 80, 2, 256, True): Tile(64, 64, 8, 2),
    Key("attention_bwd_rows", 90, 2, 256, True): Tile(64, 64, 4, 2),
    Key("attention_bwd_rows", 120, 2, 256, True): Tile(32, 64, 8, 1),
    Key("attention_fwd", 80, 4, 64, False): Tile(64, 16, 4, 1),
    Key("attention_fwd", 90, 4, 64, False): Tile(32, 32, 4, 1),
    Key("attention_fwd", 120, 4, 64, False): Tile(32, 32, 4, 1),
    Key("attention_fwd", 80, 4, 64, True): Tile(32, 32, 8, 1),
    Key("attention_fwd", 86, 4, 96, False): Tile(32, 16, 8, 1),
    Key("attention_fwd", 80, 4, 128, False): Tile(64, 16, 4, 1),
    Key("attention_fwd", 86, 4, 128, False): Tile(32, 32, 8, 1),
    Key("attention_fwd", 90, 4, 128, False): Tile(32, 32, 8, 1),
    Key("attention_fwd", 80, 4, 128, True): Tile(16, 16, 8, 1),
    Key("attention_fwd", 80, 4, 256, False): Tile(32, 32, 8, 1),
    Key("attention_fwd", 86, 4, 256, False): Tile(16, 32, 8, 1),
    Key("attention_fwd", 90, 4, 256, False): Tile(32, 16, 8, 1),
    Key("attention_fwd", 80, 4, 256, True): Tile(16, 16, 8, 1),
    Key("attention_fwd", 80, 2, 64, False): Tile(128, 64, 4, 3),
    Key("attention_fwd", 86, 2, 64, False): Tile(128, 64, 8, 2),
    Key("attention_fwd", 100, 2, 64, False): Tile(128, 64, 8, 2),
    Key("attention_fwd", 80, 2, 64, True): Tile(64, 64, 8, 2),
    Key("attention_fwd", 90, 2, 64, True): Tile(128, 64, 8, 2),
    Key("attention_fwd", 80, 2, 128, False): Tile(64, 64, 4, 2),
    Key("attention_fwd", 86, 2, 128, False): Tile(64, 64, 8, 2),
    Key("attention_fwd", 90, 2, 128, False): Tile(128, 64, 8, 2),
    Key("attention_fwd", 80, 2, 128, True): Tile(64, 32, 8, 1),
    Key("attention_fwd", 90, 2, 128, True): Tile(64, 64, 8, 2),
    Key("attention_fwd", 120, 2, 128, True): Tile(32, 32, 4, 1),
    Key("attention_fwd", 80, 2, 256, False): Tile(64, 64, 8, 2),
    Key("attention_fwd", 86, 2, 256, False): Tile(64, 64, 8, 1),
    Key("attention_fwd", 90, 2, 256, False): Tile(64, 32, 4, 1),
    Key("attention_fwd", 100, 2, 256, False): Tile(128, 64, 8, 2),
    Key("attention_fwd", 80, 2, 256, True): Tile(64, 32, 8, 1),
    Key("attention_fwd", 90, 2, 256, True): Tile(32, 16, 4, 1),
    Key("attention_fwd", 100, 2, 256, True): Tile(64, 64, 8, 2),
    Key("attention_fwd", 120, 2, 256, True): Tile(32, 16, 4, 1),
    Key("relative_bwd_keys", 80, 4, 64, False, True): Tile(32, 32, 8, 1),
    Key("relative_bwd_keys", 90, 4, 64, False, True): Tile(32, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys", 80, 4, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys", 86, 4, 64, True, True): Tile(32, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys", 90, 4, 64, True, True): Tile(32, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys", 86, 4, 96, False, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_keys", 86, 4, 96, False): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys", 80, 4, 128, False, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys", 100, 4, 128, False, True): Tile(32, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys", 80, 4, 128, True, True): Tile(16, 16, 8, 1, maxnreg=None),
    Key("relative_bwd_keys", 80, 2, 32, False, True): Tile(32, 32, 4, 1),
    Key("relative_bwd_keys", 90, 2, 32, False, True): Tile(64, 64, 8, 1),
    Key("relative_bwd_keys", 80, 2, 32, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys", 86, 2, 32, True, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_keys", 90, 2, 32, True, True): Tile(32, 64, 8, 1),
    Key("relative_bwd_keys", 100, 2, 32, True, True): Tile(64, 64, 8, 1),
    Key("relative_bwd_keys", 80, 2, 64, False, True): Tile(32, 32, 4, 1),
    Key("relative_bwd_keys", 90, 2, 64, False, True): Tile(32, 64, 4, 1),
    Key("relative_bwd_keys", 100, 2, 64, False, True): Tile(64, 64, 8, 1),
    Key("relative_bwd_keys", 90, 2, 64, False): Tile(64, 64, 8, 1),
    Key("relative_bwd_keys", 80, 2, 64, True, True): Tile(32, 32, 8, 1),
    Key("relative_bwd_keys", 86, 2, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys", 90, 2, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys", 100, 2, 64, True, True): Tile(64, 64, 8, 1),
    Key("relative_bwd_keys", 80, 2, 128, False, True): Tile(16, 64, 8, 1),
    Key("relative_bwd_keys", 90, 2, 128, False, True): Tile(32, 64, 8, 1),
    Key("relative_bwd_keys", 80, 2, 128, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_keys", 100, 2, 128, True, True): Tile(16, 64, 8, 1),
    Key("relative_bwd_keys_positions", 80, 4, 64, False, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys_positions", 80, 4, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys_positions", 86, 4, 96, False, True): Tile(16, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys_positions", 86, 4, 96, False): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys_positions", 86, 4, 96, True, True): Tile(16, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys_positions", 80, 4, 128, False, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys_positions", 90, 4, 128, False, True): Tile(16, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_keys_positions", 80, 4, 128, True, True): Tile(16, 16, 8, 1, maxnreg=None),
    Key("relative_bwd_keys_positions", 80, 2, 64, False, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_keys_positions", 90, 2, 64, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_keys_positions", 80, 2, 64, True, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_keys_positions", 86, 2, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys_positions", 100, 2, 64, True, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_keys_positions", 80, 2, 128, False, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_keys_positions", 86, 2, 128, False, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_keys_positions", 100, 2, 128, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_keys_positions", 86, 2, 128, False): Tile(16, 32, 4, 1),
    Key("relative_bwd_keys_positions", 80, 2, 128, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_queries", 80, 4, 64, False, True): Tile(16, 32, 8, 1, True),
    Key("relative_bwd_queries", 86, 4, 64, False, True): Tile(16, 16, 8, 1, True),
    Key("relative_bwd_queries", 90, 4, 64, False, True): Tile(16, 16, 8, 1, True),
    Key("relative_bwd_queries", 80, 4, 64, True, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries", 86, 4, 96, False, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries", 86, 4, 96, False): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries", 80, 4, 128, False, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries", 80, 4, 128, True, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries", 80, 2, 32, False, True): Tile(32, 32, 4, 1, True),
    Key("relative_bwd_queries", 90, 2, 32, False, True): Tile(32, 32, 8, 1, True),
    Key("relative_bwd_queries", 100, 2, 32, False, True): Tile(64, 64, 8, 1, True),
    Key("relative_bwd_queries", 80, 2, 32, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries", 80, 2, 64, False, True): Tile(32, 64, 8, 1, True),
    Key("relative_bwd_queries", 100, 2, 64, False, True): Tile(64, 64, 8, 1, True),
    Key("relative_bwd_queries", 80, 2, 64, True, True): Tile(16, 64, 8, 1, False),
    Key("relative_bwd_queries", 90, 2, 64, True, True): Tile(32, 64, 8, 1, False),
    Key("relative_bwd_queries", 80, 2, 128, False, True): Tile(32, 64, 8, 1, False),
    Key("relative_bwd_queries", 86, 2, 128, False, True): Tile(16, 64, 8, 1, True),
    Key("relative_bwd_queries", 86, 2, 128, False): Tile(32, 64, 8, 1, False),
    Key("relative_bwd_queries", 80, 2, 128, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries", 90, 2, 128, True, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_positions", 80, 4, 64, False, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_positions", 80, 4, 64, True, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries_positions", 80, 4, 128, False, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_positions", 86, 4, 128, False, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries_positions", 90, 4, 128, False, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries_positions", 86, 4, 128, False): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_positions", 80, 4, 128, True, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries_positions", 80, 2, 64, False, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_positions", 80, 2, 64, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_positions", 80, 2, 128, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_positions", 86, 2, 128, False, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries_positions", 90, 2, 128, False, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_positions", 100, 2, 128, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_positions", 86, 2, 128, False): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_positions", 80, 2, 128, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries_positions", 90, 2, 128, True, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table", 80, 4, 64, False, True): Tile(16, 32, 8, 1, True),
    Key("relative_bwd_queries_table", 86, 4, 64, False, True): Tile(16, 16, 8, 1, True, maxnreg=None),
    Key("relative_bwd_queries_table", 90, 4, 64, False, True): Tile(16, 16, 8, 1, True, maxnreg=None),
    Key("relative_bwd_queries_table", 86, 4, 64, False): Tile(16, 16, 8, 1, True),
    Key("relative_bwd_queries_table", 80, 4, 64, True, True): Tile(16, 16, 8, 1, True),
    Key("relative_bwd_queries_table", 86, 4, 64, True, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_table", 90, 4, 64, True, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_table", 80, 2, 32, False, True): Tile(32, 32, 8, 1, False),
    Key("relative_bwd_queries_table", 100, 2, 32, False, True): Tile(64, 64, 8, 1, False),
    Key("relative_bwd_queries_table", 80, 2, 32, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries_table", 86, 2, 32, True, True): Tile(32, 32, 8, 1, False),
    Key("relative_bwd_queries_table", 90, 2, 32, True, True): Tile(32, 32, 8, 1, False),
    Key("relative_bwd_queries_table", 100, 2, 32, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_table", 80, 2, 64, False, True): Tile(32, 64, 8, 1, True),
    Key("relative_bwd_queries_table", 86, 2, 64, False, True): Tile(32, 32, 4, 1, False),
    Key("relative_bwd_queries_table", 90, 2, 64, False, True): Tile(32, 64, 8, 1, False),
    Key("relative_bwd_queries_table", 100, 2, 64, False, True): Tile(64, 64, 8, 1, False),
    Key("relative_bwd_queries_table", 120, 2, 64, False, True): Tile(32, 32, 8, 1, True),
    Key("relative_bwd_queries_table", 86, 2, 64, False): Tile(32, 32, 4, 1, True),
    Key("relative_bwd_queries_table", 80, 2, 64, True, True): Tile(32, 32, 8, 1, False),
    Key("relative_bwd_queries_table", 100, 2, 64, True, True): Tile(32, 64, 8, 1, False),
    Key("relative_bwd_queries_table", 80, 2, 128, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table", 100, 2, 128, False, True): Tile(64, 64, 8, 1, False),
    Key("relative_bwd_queries_table", 80, 2, 128, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries_table", 90, 2, 128, True, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 4, 64, False, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 4, 64, True, True): Tile(16, 16, 8, 1, False),
    Key("relative_bwd_queries_table_positions", 86, 4, 64, True, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_bwd_queries_table_positions", 80, 2, 32, False, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 2, 32, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 2, 64, False, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 86, 2, 64, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 2, 64, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 86, 2, 64, True, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 90, 2, 64, True, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 100, 2, 64, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 2, 128, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 120, 2, 128, False, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries_table_positions", 120, 2, 128, False): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_queries_table_positions", 80, 2, 128, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_bwd_queries_table_positions", 90, 2, 128, True, True): Tile(16, 32, 4, 1, False),
    Key("relative_bwd_rows", 80, 4, 64, False, True): Tile(32, 32, 8, 1),
    Key("relative_bwd_rows", 80, 4, 64, True, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_rows", 90, 4, 64, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_rows", 80, 4, 128, False, True): Tile(32, 32, 8, 1),
    Key("relative_bwd_rows", 90, 4, 128, False, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_rows", 80, 4, 128, True, True): Tile(32, 32, 8, 1, maxnreg=None),
    Key("relative_bwd_rows", 80, 2, 64, False, True): Tile(64, 64, 4, 2),
    Key("relative_bwd_rows", 86, 2, 64, False, True): Tile(32, 64, 4, 1),
    Key("relative_bwd_rows", 80, 2, 64, True, True): Tile(32, 64, 4, 1),
    Key("relative_bwd_rows", 90, 2, 64, True, True): Tile(64, 64, 4, 2),
    Key("relative_bwd_rows", 80, 2, 128, False, True): Tile(64, 64, 4, 2),
    Key("relative_bwd_rows", 86, 2, 128, False, True): Tile(32, 64, 4, 1),
    Key("relative_bwd_rows", 86, 2, 128, False): Tile(64, 64, 4, 2),
    Key("relative_bwd_rows", 80, 2, 128, True, True): Tile(32, 64, 8, 1),
    Key("relative_bwd_rows", 100, 2, 128, True, True): Tile(64, 64, 8, 1),
    Key("relative_bwd_rows_positions", 80, 4, 64, False, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_rows_positions", 80, 4, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_rows_positions", 80, 4, 128, False, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_rows_positions", 80, 4, 128, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_rows_positions", 80, 2, 64, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_rows_positions", 80, 2, 64, True, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_rows_positions", 80, 2, 128, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_rows_positions", 80, 2, 128, True, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_table", 80, 4, 64, False, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_table", 86, 4, 64, False, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table", 90, 4, 64, False, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_table", 80, 4, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_table", 86, 4, 64, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table", 90, 4, 64, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table", 80, 4, 128, False, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table", 80, 4, 128, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table", 80, 2, 32, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_table", 90, 2, 32, True, True): Tile(32, 32, 8, 1),
    Key("relative_bwd_table", 80, 2, 64, False, True): Tile(32, 32, 4, 1),
    Key("relative_bwd_table", 90, 2, 64, False, True): Tile(32, 64, 8, 1),
    Key("relative_bwd_table", 100, 2, 64, False, True): Tile(64, 64, 8, 1),
    Key("relative_bwd_table", 90, 2, 64, False): Tile(64, 64, 8, 1, maxnreg=None),
    Key("relative_bwd_table", 100, 2, 64, False): Tile(64, 64, 8, 1),
    Key("relative_bwd_table", 80, 2, 64, True, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_table", 90, 2, 64, True, True): Tile(32, 32, 8, 1),
    Key("relative_bwd_table", 100, 2, 64, True, True): Tile(32, 64, 8, 1),
    Key("relative_bwd_table", 80, 2, 128, False, True): Tile(16, 64, 8, 1),
    Key("relative_bwd_table", 100, 2, 128, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_table", 80, 2, 128, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_table", 90, 2, 128, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table", 100, 2, 128, True, True): Tile(16, 64, 8, 1),
    Key("relative_bwd_table_positions", 80, 4, 64, False, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_table_positions", 86, 4, 64, False, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_table_positions", 86, 4, 64, False): Tile(16, 32, 8, 1),
    Key("relative_bwd_table_positions", 80, 4, 64, True, True): Tile(16, 32, 8, 1),
    Key("relative_bwd_table_positions", 86, 4, 64, True, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_table_positions", 90, 4, 64, True, True): Tile(16, 16, 4, 1),
    Key("relative_bwd_table_positions", 80, 4, 128, False, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table_positions", 80, 4, 128, True, True): Tile(16, 16, 8, 1),
    Key("relative_bwd_table_positions", 80, 2, 64, False, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_table_positions", 90, 2, 64, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_table_positions", 80, 2, 64, True, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_table_positions", 100, 2, 64, True, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_table_positions", 80, 2, 128, False, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_table_positions", 100, 2, 128, False, True): Tile(16, 64, 4, 1),
    Key("relative_bwd_table_positions", 80, 2, 128, True, True): Tile(16, 32, 4, 1),
    Key("relative_bwd_table_positions", 120, 2, 128, True, True): Tile(16, 32, 8, 1),
    Key("relative_fwd", 80, 4, 64, False, True): Tile(32, 32, 8, 1, True),
    Key("relative_fwd", 90, 4, 64, False, True): Tile(32, 32, 8, 1, False, maxnreg=None),
    Key("relative_fwd", 100, 4, 64, False, True): Tile(16, 32, 4, 1, False, maxnreg=None),
    Key("relative_fwd", 80, 4, 64, True, True): Tile(32, 32, 8, 1, True),
    Key("relative_fwd", 86, 4, 64, True, True): Tile(16, 32, 8, 1, True),
    Key("relative_fwd", 90, 4, 64, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_fwd", 86, 4, 96, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_fwd", 86, 4, 96, False): Tile(16, 16, 8, 1, False),
    Key("relative_fwd", 80, 4, 128, False, True): Tile(32, 32, 8, 1, False),
    Key("relative_fwd", 86, 4, 128, False, True): Tile(16, 32, 8, 1, False),
    Key("relative_fwd", 90, 4, 128, False, True): Tile(16, 32, 8, 1, False),
    Key("relative_fwd", 80, 4, 128, True, True): Tile(16, 16, 8, 1, True),
    Key("relative_fwd", 86, 4, 128, True, True): Tile(16, 16, 8, 1, True, maxnreg=None),
    Key("relative_fwd", 90, 4, 128, True, True): Tile(16, 16, 8, 1, False),
    Key("relative_fwd", 100, 4, 128, True, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_fwd", 80, 2, 32, True, True): Tile(64, 64, 4, 2, False),
    Key("relative_fwd", 86, 2, 32, True, True): Tile(64, 64, 8, 1, False),
    Key("relative_fwd", 90, 2, 32, True, True): Tile(64, 64, 8, 1, False),
    Key("relative_fwd", 100, 2, 32, True, True): Tile(64, 64, 8, 1, True),
    Key("relative_fwd", 80, 2, 64, False, True): Tile(32, 64, 4, 1, True),
    Key("relative_fwd", 90, 2, 64, False, True): Tile(64, 64, 4, 2, True),
    Key("relative_fwd", 80, 2, 64, True, True): Tile(32, 64, 4, 1, True),
    Key("relative_fwd", 86, 2, 64, True, True): Tile(32, 64, 4, 1, False),
    Key("relative_fwd", 90, 2, 64, True, True): Tile(32, 64, 8, 1, False),
    Key("relative_fwd", 100, 2, 64, True, True): Tile(64, 64, 8, 1, True),
    Key("relative_fwd", 80, 2, 128, False, True): Tile(64, 64, 8, 1, True),
    Key("relative_fwd", 90, 2, 128, False, True): Tile(64, 64, 8, 1, False),
    Key("relative_fwd", 100, 2, 128, False, True): Tile(64, 64, 8, 1, True),
    Key("relative_fwd", 80, 2, 128, True, True): Tile(32, 64, 8, 1, True),
    Key("relative_fwd", 90, 2, 128, True, True): Tile(32, 64, 8, 1, False),
    Key("relative_fwd", 100, 2, 128, True, True): Tile(64, 64, 8, 1, True),
    Key("relative_fwd_positions", 80, 4, 64, False, True): Tile(16, 32, 4, 1, False),
    Key("relative_fwd_positions", 86, 4, 64, False, True): Tile(16, 32, 4, 1, False, maxnreg=None),
    Key("relative_fwd_positions", 90, 4, 64, False, True): Tile(16, 32, 8, 1, False),
    Key("relative_fwd_positions", 86, 4, 64, False): Tile(16, 32, 4, 1, False),
    Key("relative_fwd_positions", 80, 4, 64, True, True): Tile(16, 32, 8, 1, False),
    Key("relative_fwd_positions", 80, 4, 128, False, True): Tile(16, 32, 8, 1, False),
    Key("relative_fwd_positions", 80, 4, 128, True, True): Tile(16, 16, 8, 1, False),
    Key("relative_fwd_positions", 90, 4, 128, True, True): Tile(16, 16, 8, 1, False, maxnreg=None),
    Key("relative_fwd_positions", 80, 2, 64, False, True): Tile(16, 64, 4, 1, False),
    Key("relative_fwd_positions", 80, 2, 64, True, True): Tile(16, 64, 4, 1, False),
    Key("relative_fwd_positions", 80, 2, 128, False, True): Tile(16, 64, 4, 1, False),
    Key("relative_fwd_positions", 80, 2, 128, True, True): Tile(16, 64, 4, 1, False),
}

# How kernels of scores are compiled: no fused multiply-add (see _attention.py).
COMPILE_OPTIONS = {"enable_fp_fusion": False}

# In the interpreter the sizes of tests are a few tiles of these.  The band of a relative tile is two blocks of keys, so
# that it has at least as many keys as queries.
_INTERPRETED = Tile(32, 16, 4, 1)
_INTERPRETED_RELATIVE = Tile(32, 32, 4, 1)
# The kernels of `_relative.py` that can carry the band; queries at positions of their own have none to carry.
CARRYING = tuple(
    f"relative_{kernel}{positions}"
    for kernel in ("fwd", "bwd_queries", "bwd_queries_table")
    for positions in ("", "_positions")
)


def configuration(kernel: str, query: Tensor, extras: bool, segments: bool = False) -> Tile:
    """The tile of a kernel for these queries `[..., D]`; `extras` and `segments` as in `Key`."""
    if INTERPRETED:
        if not kernel.startswith("relative"):
            return _INTERPRETED
        return _INTERPRETED_RELATIVE._replace(CARRY=True if kernel in CARRYING else None)
    return row_for(kernel, card(query.device), query.element_size(), query.shape[-1], extras, segments)


@functools.cache
def row_for(kernel: str, card: Card, size: int, head_size: int, extras: bool, segments: bool = False) -> Tile:
    """The tile of the best of the rows that are for such a call; see `best_of`."""
    return TABLE[best_of(TABLE, kernel, card, size, head_size, extras, segments)]


def best_of(
    rows: Iterable[Key], kernel: str, card: Card, size: int, head_size: int, extras: bool, segments: bool
) -> Key:
    """Of the rows for this head size and larger ones the smallest's; of those the ones without segments, if they are
    for the call and there are some; of those the newest that holds for the card.
    """
    found = (
        key
        for key in rows
        if (key.kernel, key.bytes, key.extras) == (kernel, size, extras)
        and holds_for(key.architecture, card)
        and head_size <= key.head_size
        and segments <= key.segments
    )
    return min(found, key=lambda key: (key.head_size, key.segments, -key.architecture))


def refusal_of_heads(kernel: str, *tensors: Tensor | None) -> str | None:
    """The `supports` of the ops of scores: head sizes that have a tile, on a card that has room for it."""
    head_size = tensors[0].shape[-1] if tensors and tensors[0] is not None and tensors[0].dim() else 0
    most = max_head_size(kernel)
    if head_size > most:
        return f"it takes head sizes of at most {most}, not {head_size}"
    reason = refusal(*tensors)
    if reason is not None or INTERPRETED or not tensors or tensors[0] is None:
        return reason
    return lack_of_room(tensors[0].device.index or 0)


def lack_of_room(device: int) -> str | None:
    """Why no tile fits the CUDA device of this index, or None."""
    shared = card(torch.device("cuda", device)).shared
    if shared >= SMALL_SHARED:
        return None
    return f"its tiles take up to {SMALL_SHARED} bytes of shared memory, and a block of this device has {shared}"


# What `torch.compiler.assume_constant_result` sets: a compiler calls this and does not trace it.
lack_of_room._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Of each kernel the largest head size that the table has a tile for.
_MAX_HEAD_SIZES = {kernel: max(key.head_size for key in TABLE if key.kernel == kernel) for kernel, *_ in TABLE}


def max_head_size(kernel: str) -> int:
    """The largest head size that the table has a tile of this kernel for."""
    return _MAX_HEAD_SIZES[kernel]
