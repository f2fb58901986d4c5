"""dropout_add_layer_norm through the CUDA kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.cuda._launch import dtype_of, launch, partial_sums, parts_of, refusal_of_rows
from pyxlbert.launch.rows import DTYPE, address, empty_statistics, row_statistics, rows

supports = refusal_of_rows


def dropout_add_layer_norm_fwd(call: Any) -> list[Tensor]:
    """See `pyxlbert.reference.dropout_add_layer_norm.dropout_add_layer_norm_fwd`."""
    source, x_stride = rows(call.x)
    stream, residual_stride = rows(call.residual)
    y = torch.empty_like(call.residual, memory_format=torch.contiguous_format)
    copy = None if call.copy_dtype is None else torch.empty_like(y, dtype=call.copy_dtype)
    outputs = [y] if copy is None else [y, copy]
    saved = (torch.empty_like(y), *row_statistics(call.x)) if call.save else ()
    if y.numel() == 0:
        empty_statistics(saved[1:], call.eps)
        return [*outputs, *saved]
    columns = call.x.shape[-1]
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    x_bias = None if call.x_bias is None else call.x_bias.contiguous()
    launch(
        "dropout_add_layer_norm_fwd",
        call.x.device,
        *(source.data_ptr(), x_stride, stream.data_ptr(), residual_stride, address(x_bias), dtype_of(x_bias)),
        *(weight.data_ptr(), DTYPE[weight.dtype], bias.data_ptr(), DTYPE[bias.dtype]),
        *(y.data_ptr(), address(copy), *(address(one) for one in saved or (None, None, None))),
        *(address(call.seed), call.dropout_p, y.numel() // columns, columns, call.eps),
        *(DTYPE[call.x.dtype], DTYPE[call.residual.dtype], dtype_of(copy)),
    )
    return [*outputs, *saved]


def dropout_add_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.dropout_add_layer_norm.dropout_add_layer_norm_bwd`."""
    columns = call.s.shape[-1]
    gradient, dy_stride = (None, 0) if call.dy is None else rows(call.dy)
    copy_gradient, dy_copy_stride = (None, 0) if call.dy_copy is None else rows(call.dy_copy)
    dx = torch.empty_like(call.s, dtype=call.x_dtype) if call.needs_x else call.s.new_empty(0, dtype=call.x_dtype)
    dresidual = torch.empty_like(call.s) if call.needs_residual else call.s.new_empty(0)
    dweight, dbias = (one.new_empty(columns if call.needs_parameters else 0) for one in (call.weight, call.bias))
    dx_bias = (call.s if call.x_bias is None else call.x_bias).new_empty(columns if call.needs_x_bias else 0)
    if call.s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dx_bias.zero_()
    weight = call.weight.contiguous()
    count = call.mean.numel()
    parts, each = parts_of(count)
    partial = partial_sums(2, parts, columns, call.s.device) if call.needs_parameters else None
    partial_bias = partial_sums(1, parts, columns, call.s.device) if call.needs_x_bias else None
    launch(
        "dropout_add_layer_norm_bwd",
        call.s.device,
        *(address(gradient), dy_stride, address(copy_gradient), dy_copy_stride, call.s.data_ptr()),
        *(weight.data_ptr(), DTYPE[weight.dtype], call.mean.data_ptr(), call.rstd.data_ptr()),
        *(address(dx if call.needs_x else None), address(dresidual if call.needs_residual else None)),
        *(address(partial), address(partial_bias), dweight.data_ptr(), dbias.data_ptr(), DTYPE[call.bias.dtype]),
        *(dx_bias.data_ptr(), DTYPE[dx_bias.dtype], address(call.seed), call.dropout_p),
        *(count, columns, parts, each, DTYPE[call.x_dtype], DTYPE[call.s.dtype], dtype_of(copy_gradient)),
    )
    return dx, dresidual, dweight, dbias, dx_bias
