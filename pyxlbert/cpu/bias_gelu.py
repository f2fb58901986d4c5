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
    return gelu_fwd(call.x, call.bias, call.approximate)


def gelu_fwd(x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """gelu(x + bias) as `bias_gelu_fwd` has it."""
    source, _ = rows(x)
    y = torch.empty_like(source) if source is x else torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    _C.cpu.bias_gelu_fwd(source, bias, y, approximate == "tanh", torch.get_num_threads())
    return y


def bias_gelu_bwd(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_bwd`."""
    return gelu_bwd(call.dy, call.x, call.bias, call.approximate, call.needs_bias)


def gelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, approximate: str, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dbias as `bias_gelu_bwd` has them; without a bias dbias is in x's dtype."""
    source, x_stride = rows(x)
    gradient, dy_stride = rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = x.shape[-1]
    like = x if bias is None else bias
    dbias = like.new_empty(columns if needs_bias else 0)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    bias = None if bias is None else bias.contiguous()
    _C.cpu.bias_gelu_bwd(
        gradient.data_ptr(),
        source.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        dx.data_ptr(),
        dbias.data_ptr() if needs_bias else 0,
        dx.numel() // columns,
        columns,
        dy_stride,
        x_stride,
        DTYPE[x.dtype],
        DTYPE[like.dtype],
        approximate == "tanh",
        torch.get_num_threads(),
    )
    return dx, dbias
