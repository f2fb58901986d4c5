"""bias_gelu through the CUDA kernels: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.cuda._launch import DTYPE, address, dtype_of, launch, partial_sums, parts_of, refusal
from pyxlbert.launch.rows import rows

supports = refusal


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_fwd`."""
    source, stride = rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    columns = x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    launch(
        "bias_gelu_fwd",
        x.device,
        *(source.data_ptr(), stride, address(bias), dtype_of(bias), y.data_ptr()),
        *(y.numel() // columns, columns, approximate == "tanh", DTYPE[x.dtype]),
    )
    return y


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.bias_gelu.bias_gelu_bwd`."""
    source, stride = rows(x)
    gradient, dy_stride = rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = x.shape[-1]
    dbias = (x if bias is None else bias).new_empty(columns if needs_bias else 0)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    count = dx.numel() // columns
    parts, each = parts_of(count)
    partial = partial_sums(1, parts, columns, x.device) if needs_bias else None
    bias = None if bias is None else bias.contiguous()
    launch(
        "bias_gelu_bwd",
        x.device,
        *(gradient.data_ptr(), dy_stride, source.data_ptr(), stride, address(bias), dtype_of(bias)),
        *(dx.data_ptr(), address(partial), dbias.data_ptr()),
        *(count, columns, parts, each, approximate == "tanh", DTYPE[x.dtype]),
    )
    return dx, dbias
