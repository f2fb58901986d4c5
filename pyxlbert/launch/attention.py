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


# `pyxlbert.reference.relative_attention`: no row sees a key of this rank, and kernels do not read it.
UNSEEN_RANK = 2**31 - 1


def ranks_of_mask(
    mask: Tensor | None, key: Tensor, key_rank: Tensor | None = None, first_seen: int | None = None
) -> Tensor | None:
    """Ranks of keys by which those that a mask hides from every query, in every head, are not read: a NaN in their
    values would survive a weight of zero.

    Args:
        mask: boolean, 4-D, broadcastable to `[B, H, Tq, Tk]`, or None.
        key: `[B, Tk, H, D]`.
        key_rank: `[B, Tk]`, ranks that there are already.
        first_seen: keys from here on are seen whatever the mask says; None: there are none.

    Returns:
        int32 `[B, Tk]`: -1, below every query without a rank, or `key_rank`, and UNSEEN_RANK where hidden; on the CPU
        `key_rank` itself where nothing is.
    """
    if mask is None:
        return key_rank
    seen = mask.any(2).any(1)  # [B or 1, Tk or 1]
    if first_seen is not None and first_seen < key.shape[1]:
        seen = seen | (torch.arange(key.shape[1], device=key.device) >= first_seen)
    # Elsewhere the answer would be waited for.
    if seen.device.type == "cpu" and bool(seen.all()):
        return key_rank
    if key_rank is None:
        ranks = torch.where(seen, -1, UNSEEN_RANK).to(torch.int32)
        return ranks.expand(key.shape[0], key.shape[1]).contiguous()
    return key_rank.to(torch.int32).masked_fill(~seen, UNSEEN_RANK)


def only_needed(gradients: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients as an op returns them, the query's first: empty where its flag in `needs` is False."""
    return tuple(x if need else gradients[0].new_empty(0) for x, need in zip(gradients, needs, strict=True))


def lse_of(query: Tensor) -> Tensor:
    """float32 `[B, H, Tq]` (packed: `[H, total]`), not initialised."""
    *first, rows, heads, _ = query.shape
    return torch.empty((*first, heads, rows), dtype=torch.float32, device=query.device)
