"""dropout_add_layer_norm through the CUDA kernels: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.cuda._launch import DTYPE, address, dtype_of, launch, partial_sums, parts_of, refusal_of_rows
from pyxlbert.launch.rows import empty_statistics, row_statistics, rows

supports = refusal_of_rows


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
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    copy = None if copy_dtype is None else torch.empty_like(y, dtype=copy_dtype)
    outputs = [y] if copy is None else [y, copy]
    saved = (torch.empty_like(y), *row_statistics(x)) if save else ()
    if y.numel() == 0:
        empty_statistics(saved[1:], eps)
        return [*outputs, *saved]
    columns = x.shape[-1]
    weight, bias = weight.contiguous(), bias.contiguous()
    x_bias = None if x_bias is None else x_bias.contiguous()
    launch(
        "dropout_add_layer_norm_fwd",
        x.device,
        *(source.data_ptr(), x_stride, stream.data_ptr(), residual_stride, address(x_bias), dtype_of(x_bias)),
        *(weight.data_ptr(), DTYPE[weight.dtype], bias.data_ptr(), DTYPE[bias.dtype]),
        *(y.data_ptr(), address(copy), *(address(one) for one in saved or (None, None, None))),
        *(address(seed), dropout_p, y.numel() // columns, columns, eps),
        *(DTYPE[x.dtype], DTYPE[residual.dtype], dtype_of(copy)),
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
    dx = torch.empty_like(s, dtype=x_dtype) if needs_x else s.new_empty(0, dtype=x_dtype)
    dresidual = torch.empty_like(s) if needs_residual else s.new_empty(0)
    dweight, dbias = (one.new_empty(columns if needs_parameters else 0) for one in (weight, bias))
    dx_bias = (s if x_bias is None else x_bias).new_empty(columns if needs_x_bias else 0)
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dx_bias.zero_()
    weight = weight.contiguous()
    count = mean.numel()
    parts, each = parts_of(count)
    partial = partial_sums(2, parts, columns, s.device) if needs_parameters else None
    partial_bias = partial_sums(1, parts, columns, s.device) if needs_x_bias else None
    launch(
        "dropout_add_layer_norm_bwd",
        s.device,
        *(address(gradient), dy_stride, address(copy_gradient), dy_copy_stride, s.data_ptr()),
        *(weight.data_ptr(), DTYPE[weight.dtype], mean.data_ptr(), rstd.data_ptr()),
        *(address(dx if needs_x else None), address(dresidual if needs_residual else None)),
        *(address(partial), address(partial_bias), dweight.data_ptr(), dbias.data_ptr(), DTYPE[bias.dtype]),
        *(dx_bias.data_ptr(), DTYPE[dx_bias.dtype], address(seed), dropout_p),
        *(count, columns, parts, each, DTYPE[x_dtype], DTYPE[s.dtype], dtype_of(copy_gradient)),
    )
    return dx, dresidual, dweight, dbias, dx_bias
