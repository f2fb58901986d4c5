"""What launchers of all attention ops share: options of the scores, strides, the statistics of a softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tags of the dropout bits: Tag of csrc/types.h, kernels/_philox.py.
ATTENTION, RELATIVE_ATTENTION, QUERY_STREAM = 1, 2, 3


class ScoreOptions(NamedTuple):
    """What native kernels are told of a call's scores beside its tensors: ScoreOptions of csrc/score_options.h, which
    reads them by name, of a call of `attention` too.
    """

    scale: float
    causal: bool = False


class StreamOptions(NamedTuple):
    """What the kernels of every backend are told of a stream beside its tensors: StreamOptions of
    csrc/score_options.h, which reads them by name.

    Attributes:
        see_self: whether row i sees key i + Tk - Tq whatever the masks say.
        mask_by_position: whether the mask's row is a query's position and not its number.
        tag: of the dropout bits.
    """

    see_self: bool
    mask_by_position: bool
    tag: int


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
