"""bias_gelu through the CUDA kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.cuda._launch import dtype_of, launch, partial_sums, parts_of, refusal
from pyxlbert.launch.rows import DTYPE, address, rows

supports = refusal


def bias_gelu_fwd(call: Any) -> Tensor:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_fwd`."""
    source, stride = rows(call.x)
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    columns = call.x.shape[-1]
    bias = None if call.bias is None else call.bias.contiguous()
    launch(
        "bias_gelu_fwd",
        call.x.device,
        *(source.data_ptr(), stride, address(bias), dtype_of(bias), y.data_ptr()),
        *(y.numel() // columns, columns, call.approximate == "tanh", DTYPE[call.x.dtype]),
    )
    return y


def bias_gelu_bwd(call: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_bwd`."""
    source, stride = rows(call.x)
    gradient, dy_stride = rows(call.dy)
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    columns = call.x.shape[-1]
    dbias = (call.x if call.bias is None else call.bias).new_empty(columns if call.needs_bias else 0)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    count = dx.numel() // columns
    parts, each = parts_of(count)
    partial = partial_sums(1, parts, columns, call.x.device) if call.needs_bias else None
    bias = None if call.bias is None else call.bias.contiguous()
    launch(
        "bias_gelu_bwd",
        call.x.device,
        *(gradient.data_ptr(), dy_stride, source.data_ptr(), stride, address(bias), dtype_of(bias)),
        *(dx.data_ptr(), address(partial), dbias.data_ptr()),
        *(count, columns, parts, each, call.approximate == "tanh", DTYPE[call.x.dtype]),
    )
    return dx, dbias
