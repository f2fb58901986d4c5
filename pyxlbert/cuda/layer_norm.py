"""layer_norm through the CUDA kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.cuda._launch import launch, partial_sums, parts_of, refusal_of_rows
from pyxlbert.launch.rows import DTYPE, address, empty_statistics, row_statistics, rows

supports = refusal_of_rows


def layer_norm_fwd(call: Any) -> list[Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_fwd`."""
    source, stride = rows(call.x)
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    saved = row_statistics(call.x) if call.save else ()
    elements, columns = y.numel(), call.x.shape[-1]
    if elements == 0:
        return [y, *empty_statistics(saved, call.eps)]
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    launch(
        "layer_norm_fwd",
        call.x.device,
        *(source.data_ptr(), stride, weight.data_ptr(), DTYPE[weight.dtype], bias.data_ptr(), DTYPE[bias.dtype]),
        *(y.data_ptr(), *(address(one) for one in saved or (None, None))),
        *(elements // columns, columns, call.eps, DTYPE[call.x.dtype]),
    )
    return [y, *saved]


def layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.layer_norm.layer_norm_bwd`."""
    source, stride = rows(call.x)
    gradient, dy_stride = rows(call.dy)
    weight = call.weight.contiguous()
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    columns = call.x.shape[-1]
    size = columns if call.needs_parameters else 0
    dweight, dbias = weight.new_empty(size), call.bias.new_empty(size)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    count = call.mean.numel()
    parts, each = parts_of(count)
    partial = partial_sums(2, parts, columns, call.x.device) if call.needs_parameters else None
    launch(
        "layer_norm_bwd",
        call.x.device,
        *(gradient.data_ptr(), dy_stride, source.data_ptr(), stride, weight.data_ptr(), DTYPE[weight.dtype]),
        *(call.mean.data_ptr(), call.rstd.data_ptr(), dx.data_ptr(), address(partial)),
        *(dweight.data_ptr(), dbias.data_ptr(), DTYPE[call.bias.dtype]),
        *(count, columns, parts, each, DTYPE[call.x.dtype]),
    )
    return dx, dweight, dbias
