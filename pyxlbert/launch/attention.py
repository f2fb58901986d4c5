"""What launchers of all attention ops share: strides of heads and of scores, the statistics of a softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) of `[B, T, H, D]`, or of packed `[total, H, D]`, whose batch stride is 0."""
    found = x.stride()
    return found[:3] if len(found) == 4 else (0, found[0], found[1])


def score_strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Of a mask or bias that broadcasts to `[B, H, Tq, Tk]`: 0 along broadcast dimensions, and if there is none."""
    if x is None:
        return 0, 0, 0, 0
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))  # type: ignore[return-value]


def lse_of(query: Tensor) -> Tensor:
    """float32 `[B, H, Tq]` (packed: `[H, total]`), not initialised."""
    *first, rows, heads, _ = query.shape
    return torch.empty((*first, heads, rows), dtype=torch.float32, device=query.device)
