"""bias_gelu through the native module: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert import _C
from pyxlbert.cpu._tensors import refusal
from pyxlbert.launch.rows import DTYPE, rows

supports = refusal


def bias_gelu_fwd(call: Any) -> torch.Tensor:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_fwd`."""
    source, _ = rows(call.x)
    y = (
        torch.empty_like(source)
        if source is call.x
        else torch.empty_like(call.x, memory_format=torch.contiguous_format)
    )
    if y.numel() == 0:
        return y
    bias = None if call.bias is None else call.bias.contiguous()
    _C.cpu.bias_gelu_fwd(source, bias, y, call.approximate == "tanh", torch.get_num_threads())
    return y


def bias_gelu_bwd(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_bwd`."""
    source, x_stride = rows(call.x)
    gradient, dy_stride = rows(call.dy)
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    columns = call.x.shape[-1]
    like = call.x if call.bias is None else call.bias
    dbias = like.new_empty(columns if call.needs_bias else 0)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    bias = None if call.bias is None else call.bias.contiguous()
    _C.cpu.bias_gelu_bwd(
        gradient.data_ptr(),
        source.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        dx.data_ptr(),
        dbias.data_ptr() if call.needs_bias else 0,
        dx.numel() // columns,
        columns,
        dy_stride,
        x_stride,
        DTYPE[call.x.dtype],
        DTYPE[like.dtype],
        call.approximate == "tanh",
        torch.get_num_threads(),
    )
    return dx, dbias
