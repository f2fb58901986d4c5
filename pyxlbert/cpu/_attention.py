"""What the native glue of the attention ops shares: one call as addresses, strides and sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.launch.attention import score_strides, strides
from pyxlbert.launch.rows import DTYPE, address, int32


def inputs_of(query: Tensor, call: Any) -> tuple[_C.cpu.AttentionInputs, tuple[Tensor | None, ...]]:
    """The native description of a call, and the tensors that must live as long as it does.

    Args:
        query: `[B, T, H, D]` or packed.
        call: of attention, or what the streams of a relative op share.
    """
    heads, head_size = query.shape[-2:]
    if call.cu_seqlens is None:
        batch, queries, keys, total = query.shape[0], query.shape[1], call.key.shape[1], 0
    else:
        batch, total = call.cu_seqlens.shape[0] - 1, query.shape[0]
        queries = keys = longest(call.cu_seqlens)
    query, key, value = in_place(query), in_place(call.key), in_place(call.value)
    mask, bias = adjacent_keys(call.attention_mask), adjacent_keys(call.bias)
    key_lengths, cu_seqlens = int32(call.key_lengths), int32(call.cu_seqlens)
    inputs = _C.cpu.AttentionInputs(
        query.data_ptr(),
        strides(query),
        key.data_ptr(),
        strides(key),
        value.data_ptr(),
        strides(value),
        address(key_lengths),
        address(cu_seqlens),
        address(mask),
        score_strides(mask),
        address(bias),
        score_strides(bias),
        (batch, heads, queries, keys, head_size),
        total,
        call.scale,
        call.dropout_p,
        0 if call.seed is None else int(call.seed),
        DTYPE[query.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        call.causal,
        torch.get_num_threads(),
    )
    return inputs, (query, key, value, mask, bias, key_lengths, cu_seqlens)


def longest(cu_seqlens: Tensor) -> int:
    """The length of the longest packed sequence.

    Kernels get this and not max_seqlen: scratch and the cut of sums into blocks then follow the data, not the caller's
    bound.
    """
    return max((end - start for start, end in pairwise(cu_seqlens.tolist())), default=0)


def in_place(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def adjacent_keys(x: Tensor | None) -> Tensor | None:
    """A mask or bias, copied unless its keys are adjacent or one and its memory holds its values."""
    x = None if x is None else x.resolve_neg()
    return x.contiguous() if x is not None and x.shape[3] != 1 and x.stride(3) not in (0, 1) else x
