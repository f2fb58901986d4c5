"""attention through the CUDA kernels: tensors to addresses and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.cuda._attention import in_place, native_call, padded, refusal_of_heads, split_keys, whole_vectors
from pyxlbert.cuda._launch import launch
from pyxlbert.launch.attention import ATTENTION, StreamOptions, lse_of, only_needed, ranks_of_mask, strides
from pyxlbert.launch.rows import address

supports = refusal_of_heads

_OPTIONS = StreamOptions(False, False, ATTENTION)


def attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.attention.attention_fwd`."""
    query, head_size = call.query, call.query.shape[-1]
    columns = whole_vectors(head_size)
    out = query.new_empty((*query.shape[:-1], columns))
    lse = lse_of(query)
    if lse.numel() > 0:
        q, k, v = (in_place(padded(x, columns)) for x in (query, call.key, call.value))
        ranks = ranks_of_mask(call.attention_mask, k)
        native, _keep = native_call([_stream(call, q, out, lse)], q.shape, k, v, call, call)
        native.ranks(address(ranks))
        _partial = split_keys(native, q, k.shape[-3])
        launch("attention_fwd", query.device, native)
    return out if columns == head_size else out[..., :head_size].contiguous(), lse


def attention_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.attention.attention_bwd`."""
    tensors, head_size = (call.query, call.key, call.value), call.query.shape[-1]
    columns = whole_vectors(head_size)
    q, k, v, out, dout = (in_place(padded(x, columns)) for x in (*tensors, call.out, call.dout))
    wanted = call.bias is not None and call.needs[3]
    dbias = torch.empty_like(call.bias, memory_format=torch.contiguous_format) if wanted else call.query.new_empty(0)
    if call.lse.numel() == 0 or call.key.numel() == 0:
        zeros = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors)
        return only_needed((*zeros, dbias.zero_()), call.needs)
    # What nobody needs has no address, and kernels that compute nothing else are not launched.
    needs_query, needs_keys = call.needs[0], call.needs[1] or call.needs[2]
    if not (needs_query or needs_keys or wanted):
        return tuple(call.query.new_empty(0) for _ in call.needs)
    gradients = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip((q, k, v), (needs_query, needs_keys, needs_keys), strict=True)
    )
    out, lse = out.contiguous(), call.lse.contiguous()
    delta, lse_correction = torch.empty_like(lse), torch.empty_like(lse)
    stream = _stream(call, q, out, lse)
    stream.gradients(
        *(dout.data_ptr(), strides(dout), delta.data_ptr(), lse_correction.data_ptr()),
        *(address(gradients[0]), *(0, 0, 0)),
    )
    ranks = ranks_of_mask(call.attention_mask, k)
    native, _keep = native_call([stream], q.shape, k, v, call, call)
    native.ranks(address(ranks))
    shape = tuple(call.bias.shape) if wanted else (0, 0, 0, 0)
    native.gradients(address(gradients[1]), address(gradients[2]), 0, address(dbias if wanted else None), shape)
    launch("attention_bwd", call.query.device, native)
    found = (call.query.new_empty(0) if x is None else x[..., :head_size].contiguous() for x in gradients)
    return only_needed((*found, dbias), call.needs)


def _stream(call: Any, query: Tensor, out: Tensor, lse: Tensor) -> Any:
    return backends.cuda_kernels.Stream(
        *(query.data_ptr(), strides(query), query.shape[-3] if call.cu_seqlens is None else call.max_seqlen),
        *(0, 0, 0, 0, _OPTIONS, out.data_ptr(), lse.data_ptr()),
    )
