"""Counter-based random bits for dropout: Philox 4x32-10, the same bits on every backend.

The generator has no state. A 64-bit key (the seed) and a 128-bit counter give four 32-bit words, so any
tile of a mask can be drawn again in backward, by any thread, without storing it.

Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Tag(enum.IntEnum):
    """Last counter word: one value per op and stream, so that two ops never share bits under one seed.

    ``csrc/cpu/philox.h`` holds the same table.
    """

    ATTENTION = 1
    RELATIVE_ATTENTION = 2
    QUERY_STREAM = 3
    DROPOUT_ADD_LAYER_NORM = 4
    EMBEDDING_LAYER_NORM = 5
    DROPOUT = 6


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four int64 tensors that broadcast together; the low 32 bits of each count.
        seed: int64 tensor of one element, the 64-bit key (low word first).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = (c & _MASK for c in torch.broadcast_tensors(*counter))
    key = seed.reshape(())
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # The signed product wraps modulo 2^64, which leaves all 64 bits right.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _keep(seed: Tensor, dropout_p: float, columns: int, row: Tensor, plane: Tensor, tag: Tag) -> Tensor:
    """Column j of the last axis takes word ``j % 4`` of counter ``(j // 4, row, plane, tag)``."""
    block = torch.arange((columns + 3) // 4, device=seed.device)
    last = torch.tensor(int(tag), device=seed.device)
    words = torch.stack(philox4x32((block, row[..., None], plane[..., None], last), seed), dim=-1)
    return words.flatten(-2)[..., :columns] >= math.floor(dropout_p * 2**32)


def keep_scores(
    seed: Tensor, dropout_p: float, batch: int, heads: int, queries: int, keys: int, tag: Tag = Tag.ATTENTION
) -> Tensor:
    """Which attention weights survive: counter ``(j // 4, i, b * H + h, tag)``.

    Returns:
        Boolean ``[B, H, Tq, Tk]`` on the device of ``seed``.
    """
    row = torch.arange(queries, device=seed.device)
    plane = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1)
    return _keep(seed, dropout_p, keys, row, plane, tag)


def keep_rows(seed: Tensor, dropout_p: float, rows: int, columns: int, tag: Tag) -> Tensor:
    """Which elements of a row kernel survive: counter ``(column // 4, row, row >> 32, tag)``.

    Returns:
        Boolean ``[M, N]`` on the device of ``seed``.
    """
    row = torch.arange(rows, device=seed.device)
    return _keep(seed, dropout_p, columns, row, row >> 32, tag)
