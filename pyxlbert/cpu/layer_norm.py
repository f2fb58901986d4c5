"""layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

import torch

from pyxlbert import _C
from pyxlbert.cpu._tensors import DTYPE, refusal, row_statistics
from pyxlbert.launch.rows import empty_statistics, rows

supports = refusal


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, save: bool
) -> list[torch.Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_fwd`."""
    source, stride = rows(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    y = torch.empty_like(source) if source is x else torch.empty_like(x, memory_format=torch.contiguous_format)
    elements, columns = y.numel(), x.shape[-1]
    saved = row_statistics(x) if save else ()
    if elements == 0:
        return [y, *empty_statistics(saved, eps)]
    _C.cpu.layer_norm_fwd(
        source.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        saved[0].data_ptr() if save else 0,
        saved[1].data_ptr() if save else 0,
        elements // columns,
        columns,
        stride,
        eps,
        DTYPE[x.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        torch.get_num_threads(),
    )
    return [y, *saved]


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
