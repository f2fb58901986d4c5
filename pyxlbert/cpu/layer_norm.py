"""layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert import _C
from pyxlbert.cpu._tensors import refusal, row_statistics
from pyxlbert.launch.rows import DTYPE, empty_statistics, rows

supports = refusal


def layer_norm_fwd(call: Any) -> list[torch.Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_fwd`."""
    source, _ = rows(call.x)
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    y = (
        torch.empty_like(source)
        if source is call.x
        else torch.empty_like(call.x, memory_format=torch.contiguous_format)
    )
    saved = row_statistics(call.x) if call.save else ()
    if y.numel() == 0:
        return [y, *empty_statistics(saved, call.eps)]
    mean, rstd = saved or (None, None)
    _C.cpu.layer_norm_fwd(source, weight, bias, y, mean, rstd, call.eps, torch.get_num_threads())
    return [y, *saved]


def layer_norm_out(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """y alone, of at least one element: without a record of the call, which is a sixth of the time of a small one."""
    source = x if x.is_contiguous() else rows(x)[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.cpu.layer_norm_fwd(source, weight.contiguous(), bias.contiguous(), y, None, None, eps, torch.get_num_threads())
    return y


def layer_norm_bwd(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_bwd`."""
    source, x_stride = rows(call.x)
    gradient, dy_stride = rows(call.dy)
    weight = call.weight.contiguous()
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    n = call.x.shape[-1] if call.needs_parameters else 0
    dweight, dbias = weight.new_empty(n), call.bias.new_empty(n)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    _C.cpu.layer_norm_bwd(
        gradient.data_ptr(),
        source.data_ptr(),
        weight.data_ptr(),
        call.mean.data_ptr(),
        call.rstd.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr() if call.needs_parameters else 0,
        dbias.data_ptr() if call.needs_parameters else 0,
        call.mean.numel(),
        call.x.shape[-1],
        dy_stride,
        x_stride,
        DTYPE[call.x.dtype],
        DTYPE[weight.dtype],
        DTYPE[call.bias.dtype],
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
