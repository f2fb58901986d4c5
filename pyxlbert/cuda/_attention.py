"""What the CUDA glue of the attention ops shares: one call as addresses, strides and sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.cuda._launch import dtype_of, refusal
from pyxlbert.launch.attention import score_strides, strides
from pyxlbert.launch.rows import DTYPE, address, int32


def refusal_of_heads(*tensors: Tensor | None) -> str | None:
    """The `supports` of the attention ops: the first tensor's head size is bounded."""
    head_size = tensors[0].shape[-1] if tensors and tensors[0] is not None and tensors[0].dim() else 0
    if head_size > backends.cuda_kernels.MAX_HEAD_SIZE:
        return f"it takes head sizes of at most {backends.cuda_kernels.MAX_HEAD_SIZE}, not {head_size}"
    return refusal(*tensors)


def in_place(x: Tensor) -> Tensor:
    """x itself where its rows of D adjacent elements begin at multiples of 16 bytes, else a copy in which they do."""
    each = 16 // x.element_size()
    *outer, columns = x.stride()
    sizes = x.shape
    adjacent = columns == 1 or sizes[-1] == 1
    vectors = all(stride % each == 0 or size == 1 for stride, size in zip(outer, sizes, strict=False))
    if adjacent and vectors and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def padded(x: Tensor, columns: int) -> Tensor:
    """x `[..., D]` with zeros up to so many columns."""
    return x if x.shape[-1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[-1]))


def whole_vectors(head_size: int) -> int:
    """The head size that kernels see: the next multiple of 8."""
    return -(-head_size // 8) * 8


def parts_of_keys(queries: int, keys: int) -> int:
    """How many parts so many keys of every head are split into, which depends on the sequence alone: a row has the same
    bits in any batch. Packed sequences, with as many queries as keys, are never split.
    """
    native = backends.cuda_kernels
    split = queries <= native.FEW_QUERIES and keys >= native.MANY_KEYS
    return -(-keys // native.KEYS_OF_PART) if split else 1


def split_keys(native: Any, query: Tensor, keys: int) -> Tensor | None:
    """Has the keys of a forward call split where queries are few; what must live as long as the call.

    Args:
        native: as `native_call` describes the call.
        query: padded, `[B, Tq, H, D]` or packed.
        keys: Tk.
    """
    if query.dim() == 3 or parts_of_keys(query.shape[1], keys) == 1:
        return None
    batch, queries, heads, columns = query.shape
    # Of each row and part a sum of weighted values, the largest score and the sum of the weights.
    rows = batch * heads * queries * parts_of_keys(queries, keys)
    partial = torch.empty(rows * (columns + 2), dtype=torch.float32, device=query.device)
    native.parts(partial.data_ptr())
    return partial


def native_call(
    streams: list[Any], shape: tuple[int, ...], key: Tensor, value: Tensor, call: Any, options: Any
) -> tuple[Any, list[Tensor | None]]:
    """The native description of a call, and the tensors that must live as long as it does.

    Args:
        streams: native descriptions of the queries.
        shape: of the first stream's query, padded.
        key, value: as `in_place` and `padded` give them.
        call: of attention, or what the streams of a relative op share.
        options: what has the fields of `ScoreOptions`.
    """
    heads, head_size = shape[-2:]
    if call.cu_seqlens is None:
        batch, queries, keys, total = shape[0], shape[1], key.shape[1], 0
    else:
        batch, total = call.cu_seqlens.shape[0] - 1, shape[0]
        queries = keys = call.max_seqlen
    key_lengths, cu_seqlens = int32(call.key_lengths), int32(call.cu_seqlens)
    mask, bias = call.attention_mask, call.bias
    native = backends.cuda_kernels.AttentionCall(
        streams,
        *(key.data_ptr(), strides(key), value.data_ptr(), strides(value), address(key_lengths), address(cu_seqlens)),
        *(address(mask), score_strides(mask), address(bias), score_strides(bias), dtype_of(bias)),
        *((batch, heads, queries, keys, head_size), total, options),
        *(address(call.seed), call.dropout_p, DTYPE[key.dtype]),
    )
    return native, [key, value, key_lengths, cu_seqlens, mask, bias, call.seed]
