"""What the native glue of the attention ops shares: the native description of one call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.launch.rows import int32


def native_call(query: Tensor, call: Any, options: Any) -> tuple[_C.cpu.AttentionCall, list[Tensor | None]]:
    """The native description of a call, and the tensors that must live as long as it does.

    Args:
        query: `[B, T, H, D]` or packed.
        call: of attention, or what the streams of a relative op share.
        options: what has the fields of `ScoreOptions`.
    """
    tensors = [
        *(query, call.key, call.value, int32(call.key_lengths), int32(call.cu_seqlens)),
        *(adjacent_keys(call.attention_mask), adjacent_keys(call.bias)),
    ]
    numbers = (
        0 if call.cu_seqlens is None else longest(call.cu_seqlens),
        *(options, call.dropout_p, 0 if call.seed is None else int(call.seed)),
        torch.get_num_threads(),
    )
    inputs = _C.cpu.attention_call(*tensors, *numbers)
    if inputs is None:
        tensors[:3] = [in_place(x) for x in tensors[:3]]
        inputs = _C.cpu.attention_call(*tensors, *numbers)
    return inputs, tensors


def longest(cu_seqlens: Tensor) -> int:
    """The length of the longest packed sequence.

    Kernels get this and not max_seqlen: scratch and the cut of sums into blocks then follow the data, not the caller's
    bound.
    """
    return max((end - start for start, end in pairwise(cu_seqlens.tolist())), default=0)


def in_place(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def adjacent_keys(x: Tensor | None) -> Tensor | None:
    """A mask or bias, copied unless its keys are adjacent or one and its memory holds its values."""
    x = None if x is None else x.resolve_neg()
    return x.contiguous() if x is not None and x.shape[3] != 1 and x.stride(3) not in (0, 1) else x
