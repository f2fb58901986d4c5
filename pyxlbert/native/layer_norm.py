"""layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

import torch

from pyxlbert import _C
from pyxlbert.native._tensors import DTYPE, refusal, row_statistics, rows

supports = refusal


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_fwd`."""
    source, stride = rows(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    y = torch.empty_like(source) if source is x else torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = row_statistics(x)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    _C.cpu.layer_norm_fwd(
        source.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        mean.numel(),
        x.shape[-1],
        stride,
        eps,
        DTYPE[x.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        torch.get_num_threads(),
    )
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs_parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_bwd`."""
    source, x_stride = rows(x)
    gradient, dy_stride = rows(dy)
    weight = weight.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = x.shape[-1] if needs_parameters else 0
    dweight, dbias = weight.new_empty(n), bias.new_empty(n)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    _C.cpu.layer_norm_bwd(
        gradient.data_ptr(),
        source.data_ptr(),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr() if needs_parameters else 0,
        dbias.data_ptr() if needs_parameters else 0,
        mean.numel(),
        x.shape[-1],
        dy_stride,
        x_stride,
        DTYPE[x.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
