"""attention through the native module: tensors to addresses and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._attention import in_place, inputs_of, strides
from pyxlbert.cpu._tensors import refusal


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
    inputs, _keep = inputs_of(
        query, key, value, key_lengths, cu_seqlens, attention_mask, bias, causal, scale, dropout_p, seed
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
    inputs, _keep = inputs_of(
        query, key, value, key_lengths, cu_seqlens, attention_mask, bias, causal, scale, dropout_p, seed
    )
    dout, out, lse = in_place(dout), out.contiguous(), lse.contiguous()
    _C.cpu.attention_bwd(
        inputs,
        dout.data_ptr(),
        strides(dout),
        out.data_ptr(),
        lse.data_ptr(),
        *(x.data_ptr() for x in gradients),
        dbias.data_ptr() if wanted else 0,
        tuple(bias.shape) if wanted else (0, 0, 0, 0),
    )
    return *gradients, dbias
