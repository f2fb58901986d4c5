"""dropout_add_layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._tensors import refusal, row_statistics
from pyxlbert.launch.rows import DTYPE, empty_statistics, rows

supports = refusal


def dropout_add_layer_norm_fwd(call: Any) -> list[Tensor]:
    """See `pyxlbert.reference.dropout_add_layer_norm.dropout_add_layer_norm_fwd`."""
    source, stream = rows(call.x)[0], rows(call.residual)[0]
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    x_bias = None if call.x_bias is None else call.x_bias.contiguous()
    y = torch.empty_like(call.residual, memory_format=torch.contiguous_format)
    outputs = [y] if call.copy_dtype is None else [y, torch.empty_like(y, dtype=call.copy_dtype)]
    saved = (torch.empty_like(y), *row_statistics(call.x)) if call.save else ()
    if y.numel() == 0:
        empty_statistics(saved[1:], call.eps)
        return [*outputs, *saved]
    _C.cpu.dropout_add_layer_norm_fwd(
        *(source, x_bias, stream, weight, bias, call.seed, y),
        None if call.copy_dtype is None else outputs[1],
        *(saved or (None, None, None)),
        *(call.eps, call.dropout_p, torch.get_num_threads()),
    )
    return [*outputs, *saved]


def add_layer_norm_out(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    copy_dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y alone, or with its copy, of at least one element and without dropout: without a record of the call."""
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    copy = None if copy_dtype is None else torch.empty_like(y, dtype=copy_dtype)
    _C.cpu.dropout_add_layer_norm_fwd(
        x if x.is_contiguous() else rows(x)[0],
        None if x_bias is None else x_bias.contiguous(),
        residual if residual.is_contiguous() else rows(residual)[0],
        *(weight.contiguous(), bias.contiguous(), None, y, copy, None, None, None),
        *(eps, 0.0, torch.get_num_threads()),
    )
    return y if copy is None else (y, copy)


def dropout_add_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.dropout_add_layer_norm.dropout_add_layer_norm_bwd`."""
    columns = call.s.shape[-1]
    gradient, dy_stride = (None, 0) if call.dy is None else rows(call.dy)
    copy_gradient, dy_copy_stride = (None, 0) if call.dy_copy is None else rows(call.dy_copy)
    weight = call.weight.contiguous()
    like = call.s if call.x_bias is None else call.x_bias
    dx = torch.empty_like(call.s, dtype=call.x_dtype) if call.needs_x else torch.empty(0, dtype=call.x_dtype)
    dresidual = torch.empty_like(call.s) if call.needs_residual else torch.empty(0, dtype=call.s.dtype)
    dweight = weight.new_empty(columns if call.needs_parameters else 0)
    dbias = call.bias.new_empty(columns if call.needs_parameters else 0)
    dx_bias = like.new_empty(columns if call.needs_x_bias else 0)
    if call.s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dx_bias.zero_()
    _C.cpu.dropout_add_layer_norm_bwd(
        0 if gradient is None else gradient.data_ptr(),
        0 if copy_gradient is None else copy_gradient.data_ptr(),
        call.s.data_ptr(),
        weight.data_ptr(),
        call.mean.data_ptr(),
        call.rstd.data_ptr(),
        0 if call.seed is None else call.seed.data_ptr(),
        dx.data_ptr() if call.needs_x else 0,
        dresidual.data_ptr() if call.needs_residual else 0,
        dx_bias.data_ptr() if call.needs_x_bias else 0,
        dweight.data_ptr() if call.needs_parameters else 0,
        dbias.data_ptr() if call.needs_parameters else 0,
        call.mean.numel(),
        columns,
        dy_stride,
        dy_copy_stride,
        call.dropout_p,
        DTYPE[call.x_dtype],
        DTYPE[call.s.dtype],
        DTYPE[like.dtype],
        DTYPE[weight.dtype],
        DTYPE[call.bias.dtype],
        DTYPE[call.s.dtype if copy_gradient is None else copy_gradient.dtype],
        torch.get_num_threads(),
    )
    return dx, dresidual, dweight, dbias, dx_bias
