"""attention through the native module: tensors to addresses and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.native._tensors import DTYPE, refusal


def supports(*tensors: Tensor | None) -> str | None:
    """CPU tensors in float32, bfloat16 and float16."""
    return refusal(*tensors)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.attention.attention_fwd`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if cu_seqlens is None:
        batch, queries, heads, _ = query.shape
        lse = torch.empty((batch, heads, queries), dtype=torch.float32)
    else:
        lse = torch.empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    inputs, _keep = _inputs(
        query, key, value, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias, causal, scale, dropout_p, seed
    )
    _C.cpu.attention_fwd(inputs, out.data_ptr(), lse.data_ptr())
    return out, lse


def attention_bwd(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.attention.attention_bwd`."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    wanted = bias is not None and needs_bias
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted else query.new_empty(0)
    if lse.numel() == 0 or key.numel() == 0:
        return *(x.zero_() for x in gradients), dbias.zero_()
    inputs, _keep = _inputs(
        query, key, value, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias, causal, scale, dropout_p, seed
    )
    dout, out, lse = _in_place(dout), out.contiguous(), lse.contiguous()
    _C.cpu.attention_bwd(
        inputs,
        dout.data_ptr(),
        _strides(dout),
        out.data_ptr(),
        lse.data_ptr(),
        *(x.data_ptr() for x in gradients),
        dbias.data_ptr() if wanted else 0,
        tuple(bias.shape) if wanted else (0, 0, 0, 0),
    )
    return *gradients, dbias


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
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
        batch, queries, keys, total = cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen, query.shape[0]
    query, key, value = _in_place(query), _in_place(key), _in_place(value)
    mask, mask_strides = _scores(attention_mask)
    bias, bias_strides = _scores(bias)
    key_lengths, cu_seqlens = _int32(key_lengths), _int32(cu_seqlens)
    inputs = _C.cpu.AttentionInputs(
        query.data_ptr(),
        _strides(query),
        key.data_ptr(),
        _strides(key),
        value.data_ptr(),
        _strides(value),
        _address(key_lengths),
        _address(cu_seqlens),
        _address(mask),
        mask_strides,
        _address(bias),
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


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _in_place(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
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
