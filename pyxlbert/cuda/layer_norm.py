"""layer_norm through the CUDA kernels: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.cuda._launch import DTYPE, address, launch, partial_sums, parts_of, refusal_of_rows
from pyxlbert.launch.rows import empty_statistics, row_statistics, rows

supports = refusal_of_rows


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, save: bool) -> list[Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_fwd`."""
    source, stride = rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    saved = row_statistics(x) if save else ()
    elements, columns = y.numel(), x.shape[-1]
    if elements == 0:
        return [y, *empty_statistics(saved, eps)]
    weight, bias = weight.contiguous(), bias.contiguous()
    launch(
        "layer_norm_fwd",
        x.device,
        *(source.data_ptr(), stride, weight.data_ptr(), DTYPE[weight.dtype], bias.data_ptr(), DTYPE[bias.dtype]),
        *(y.data_ptr(), *(address(one) for one in saved or (None, None))),
        *(elements // columns, columns, eps, DTYPE[x.dtype]),
    )
    return [y, *saved]


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_bwd`."""
    source, stride = rows(x)
    gradient, dy_stride = rows(dy)
    weight = weight.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = x.shape[-1]
    size = columns if needs_parameters else 0
    dweight, dbias = weight.new_empty(size), bias.new_empty(size)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    count = mean.numel()
    parts, each = parts_of(count)
    partial = partial_sums(2, parts, columns, x.device) if needs_parameters else None
    launch(
        "layer_norm_bwd",
        x.device,
        *(gradient.data_ptr(), dy_stride, source.data_ptr(), stride, weight.data_ptr(), DTYPE[weight.dtype]),
        *(mean.data_ptr(), rstd.data_ptr(), dx.data_ptr(), address(partial)),
        *(dweight.data_ptr(), dbias.data_ptr(), DTYPE[bias.dtype]),
        *(count, columns, parts, each, DTYPE[x.dtype]),
    )
    return dx, dweight, dbias
