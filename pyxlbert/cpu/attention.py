"""attention through the native module: tensors to addresses and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._attention import in_place, native_call
from pyxlbert.cpu._tensors import refusal
from pyxlbert.launch.attention import lse_of, only_needed, strides
from pyxlbert.launch.rows import address

supports = refusal


def attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.attention.attention_fwd`."""
    out, lse = torch.empty_like(call.query, memory_format=torch.contiguous_format), lse_of(call.query)
    if lse.numel() == 0:
        return out, lse
    inputs, _keep = native_call(call.query, call, call)
    _C.cpu.attention_fwd(inputs, out, lse)
    return out, lse


def attention_out(call: Any) -> Tensor:
    """The result of `attention_fwd` without what backward wants; of tensors with elements."""
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    inputs, _keep = native_call(call.query, call, call)
    _C.cpu.attention_fwd(inputs, out, None)
    return out


def attention_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.attention.attention_bwd`."""
    tensors = (call.query, call.key, call.value)
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    wanted = call.bias is not None and call.needs[3]
    dbias = torch.empty_like(call.bias, memory_format=torch.contiguous_format) if wanted else call.query.new_empty(0)
    if call.lse.numel() == 0 or call.key.numel() == 0:
        return only_needed((*(x.zero_() for x in gradients), dbias.zero_()), call.needs)
    inputs, _keep = native_call(call.query, call, call)
    dout, out, lse = in_place(call.dout), call.out.contiguous(), call.lse.contiguous()
    _C.cpu.attention_bwd(
        inputs,
        dout.data_ptr(),
        strides(dout),
        out.data_ptr(),
        lse.data_ptr(),
        *(x.data_ptr() for x in gradients),
        address(dbias if wanted else None),
        tuple(call.bias.shape) if wanted else (0, 0, 0, 0),
    )
    return only_needed((*gradients, dbias), call.needs)
