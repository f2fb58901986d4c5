"""What the native glue of the attention ops shares: one call as addresses, strides and sizes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._tensors import DTYPE
from pyxlbert.launch.rows import int32


def inputs_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[_C.cpu.AttentionInputs, tuple[Tensor | None, ...]]:
    """The native description of a call, and the tensors that must live as long as it does."""
    heads, head_size = query.shape[-2:]
    if cu_seqlens is None:
        batch, queries, keys, total = query.shape[0], query.shape[1], key.shape[1], 0
    else:
        batch, total = cu_seqlens.shape[0] - 1, query.shape[0]
        queries = keys = longest(cu_seqlens)
    query, key, value = in_place(query), in_place(key), in_place(value)
    mask, mask_strides = _scores(attention_mask)
    bias, bias_strides = _scores(bias)
    key_lengths, cu_seqlens = int32(key_lengths), int32(cu_seqlens)
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
        mask_strides,
        address(bias),
        bias_strides,
        (batch, heads, queries, keys, head_size),
        total,
        scale,
        dropout_p,
        0 if seed is None else int(seed),
        DTYPE[query.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        causal,
        torch.get_num_threads(),
    )
    return inputs, (query, key, value, mask, bias, key_lengths, cu_seqlens)


def longest(cu_seqlens: Tensor) -> int:
    """The length of the longest packed sequence.

    Kernels get this and not max_seqlen: scratch and the cut of sums into blocks then follow the data, not the caller's
    bound.
    """
    return max((end - start for start, end in pairwise(cu_seqlens.tolist())), default=0)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def in_place(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) of `[B, T, H, D]` or of packed `[total, H, D]`, whose batch stride nobody reads."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, strides[0], strides[1])


def _scores(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """A mask or bias and its strides, 0 along broadcast dimensions; copied if its keys are not adjacent."""
    if x is None:
        return None, (0, 0, 0, 0)
    if x.shape[3] != 1 and x.stride(3) not in (0, 1):
        x = x.contiguous()
    return x, tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))
