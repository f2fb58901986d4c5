"""What launchers of relative_attention and two_stream_attention share: what the streams of a call have in common, and
its gradients by name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The gradients of what streams share, in the order of the ops' results; before them those of "query" and, of a second
# stream, "second".
SHARED = ("key", "value", "table", "content", "position", "segment", "embedding")


class Shared(NamedTuple):
    """What all streams of a call share."""

    key: Tensor
    value: Tensor
    table: Tensor
    offset: int
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # content, position, segment, embedding
    key_segments: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    key_rank: Tensor | None
    mask: Tensor | None
    causal: bool
    uniform: bool
    scale: float
    dropout_p: float
    seed: Tensor | None


def asked(found: dict[str, Tensor], tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients in the order of `tensors`, each shaped and rounded as its own; empty where it is not needed."""
    names = [name for name in ("query", "second", *SHARED) if name in found]
    return tuple(
        found[name].view(tensor.shape).to(tensor.dtype) if need and tensor is not None else tensors[0].new_empty(0)
        for name, tensor, need in zip(names, tensors, needs, strict=True)
    )


def with_zeros(found: dict[str, Tensor], tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """`found` with zeros for those of SHARED, in the order of `tensors`, that nothing has been added to."""
    return found | {
        name: torch.empty(0) if tensor is None else torch.zeros_like(tensor)
        for name, tensor in zip(SHARED, tensors, strict=True)
        if name not in found
    }


def at_targets(x: Tensor | None, target_positions: Tensor | None) -> Tensor | None:
    """`[B, T]` of positions to `[B, M]` of targets; what an absent target gets is not read."""
    if x is None or target_positions is None:
        return x
    if x.shape[1] == 0:
        return x.new_zeros(target_positions.shape)
    return x.gather(1, target_positions.clamp(min=0).long())
