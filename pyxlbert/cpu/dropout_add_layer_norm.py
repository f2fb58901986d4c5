"""dropout_add_layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._tensors import DTYPE, refusal, row_statistics
from pyxlbert.launch.rows import empty_statistics, rows

supports = refusal


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    eps: float,
    copy_dtype: torch.dtype | None,
    save: bool,
) -> list[Tensor]:
    """See `pyxlbert.reference.dropout_add_layer_norm.dropout_add_layer_norm_fwd`."""
    source, x_stride = rows(x)
    stream, residual_stride = rows(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    x_bias = None if x_bias is None else x_bias.contiguous()
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    outputs = [y] if copy_dtype is None else [y, torch.empty_like(y, dtype=copy_dtype)]
    saved = (torch.empty_like(y), *row_statistics(x)) if save else ()
    elements, columns = y.numel(), x.shape[-1]
    if elements == 0:
        empty_statistics(saved[1:], eps)
        return [*outputs, *saved]
    dtype = DTYPE[x.dtype]
    _C.cpu.dropout_add_layer_norm_fwd(
        source.data_ptr(),
        0 if x_bias is None else x_bias.data_ptr(),
        stream.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        y.data_ptr(),
        0 if copy_dtype is None else outputs[1].data_ptr(),
        saved[0].data_ptr() if save else 0,
        saved[1].data_ptr() if save else 0,
        saved[2].data_ptr() if save else 0,
        elements // columns,
        columns,
        x_stride,
        residual_stride,
        eps,
        dropout_p,
        dtype,
        DTYPE[residual.dtype],
        dtype if x_bias is None else DTYPE[x_bias.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        dtype if copy_dtype is None else DTYPE[copy_dtype],
        torch.get_num_threads(),
    )
    return [*outputs, *saved]


def dropout_add_layer_norm_bwd(
    dy: Tensor | None,
    dy_copy: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    needs_x: bool,
    needs_residual: bool,
    needs_parameters: bool,
    needs_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.dropout_add_layer_norm.dropout_add_layer_norm_bwd`."""
    columns = s.shape[-1]
    gradient, dy_stride = (None, 0) if dy is None else rows(dy)
    copy_gradient, dy_copy_stride = (None, 0) if dy_copy is None else rows(dy_copy)
    weight = weight.contiguous()
    like = s if x_bias is None else x_bias
    dx = torch.empty_like(s, dtype=x_dtype) if needs_x else torch.empty(0, dtype=x_dtype)
    dresidual = torch.empty_like(s) if needs_residual else torch.empty(0, dtype=s.dtype)
    dweight = weight.new_empty(columns if needs_parameters else 0)
    dbias = bias.new_empty(columns if needs_parameters else 0)
    dx_bias = like.new_empty(columns if needs_x_bias else 0)
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dx_bias.zero_()
    _C.cpu.dropout_add_layer_norm_bwd(
        0 if gradient is None else gradient.data_ptr(),
        0 if copy_gradient is None else copy_gradient.data_ptr(),
        s.data_ptr(),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        dx.data_ptr() if needs_x else 0,
        dresidual.data_ptr() if needs_residual else 0,
        dx_bias.data_ptr() if needs_x_bias else 0,
        dweight.data_ptr() if needs_parameters else 0,
        dbias.data_ptr() if needs_parameters else 0,
        mean.numel(),
        columns,
        dy_stride,
        dy_copy_stride,
        dropout_p,
        DTYPE[x_dtype],
        DTYPE[s.dtype],
        DTYPE[like.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        DTYPE[s.dtype if copy_gradient is None else copy_gradient.dtype],
        torch.get_num_threads(),
    )
    return dx, dresidual, dweight, dbias, dx_bias
