"""attention through the CUDA kernels: tensors to addresses and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.cuda._attention import (
    ATTENTION,
    description,
    in_place,
    padded,
    refusal_of_heads,
    statistics_of,
    strides,
    whole_vectors,
)
from pyxlbert.cuda._launch import launch

supports = refusal_of_heads


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
    head_size = query.shape[-1]
    columns = whole_vectors(head_size)
    out = query.new_empty((*query.shape[:-1], columns))
    lse = statistics_of(query)
    if lse.numel() > 0:
        q, k, v = (in_place(padded(x, columns)) for x in (query, key, value))
        stream = backends.cuda_kernels.QueryStream(
            *(q.data_ptr(), strides(q), q.shape[-3] if cu_seqlens is None else max_seqlen),
            *(0, 0, 0, 0, False, False, ATTENTION, out.data_ptr(), lse.data_ptr()),
        )
        call, _keep = description(
            [stream],
            q.shape,
            k,
            v,
            key_lengths,
            cu_seqlens,
            max_seqlen,
            attention_mask,
            bias,
            causal,
            scale,
            dropout_p,
            seed,
        )
        launch("attention_fwd", query.device, call)
    return out if columns == head_size else out[..., :head_size].contiguous(), lse


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
    head_size = query.shape[-1]
    columns = whole_vectors(head_size)
    q, k, v, o, do = (in_place(padded(x, columns)) for x in (query, key, value, out, dout))
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    wanted = bias is not None and needs_bias
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted else query.new_empty(0)
    if lse.numel() == 0 or key.numel() == 0:
        return *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)), dbias.zero_()
    o, lse = o.contiguous(), lse.contiguous()
    delta, rest = torch.empty_like(lse), torch.empty_like(lse)
    stream = backends.cuda_kernels.QueryStream(
        *(q.data_ptr(), strides(q), q.shape[-3] if cu_seqlens is None else max_seqlen),
        *(0, 0, 0, 0, False, False, ATTENTION, o.data_ptr(), lse.data_ptr()),
    )
    stream.gradients(
        *(do.data_ptr(), strides(do), delta.data_ptr(), rest.data_ptr(), gradients[0].data_ptr(), 0, 0, 0),
    )
    call, _keep = description(
        [stream],
        q.shape,
        k,
        v,
        key_lengths,
        cu_seqlens,
        max_seqlen,
        attention_mask,
        bias,
        causal,
        scale,
        dropout_p,
        seed,
    )
    shape = tuple(bias.shape) if wanted else (0, 0, 0, 0)
    call.gradients(gradients[1].data_ptr(), gradients[2].data_ptr(), 0, dbias.data_ptr() if wanted else 0, shape)
    launch("attention_bwd", query.device, call)
    if columns != head_size:
        gradients = tuple(x[..., :head_size].contiguous() for x in gradients)
    return *gradients, dbias
