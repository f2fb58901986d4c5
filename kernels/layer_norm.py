"""layer_norm in Triton: a program takes a few rows, whole; parameter gradients in two stages.

x      [M, N]   ->  tile [BLOCK_M, BLOCK_N], BLOCK_N >= N: mean, then the squares of what is left, then y
dy, x  [M, N]   ->  dx of the tile; dy * xhat and dy are added up over the program's rows,
                    and `sum_parts` adds the programs' sums
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import empty_statistics, row_statistics, rows

from ._launch import launch, refusal_of_rows
from ._plan import Launch, kind_of, remember, run
from ._rows import partial_sums, parts_of, sum_parts, tile_of, wide_program

supports = refusal_of_rows


def layer_norm_fwd(call: Any) -> list[Tensor]:
    """y `[..., N]` in x's dtype; where `save`, also mean and rstd `[...]` in float32."""
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    saved = row_statistics(call.x) if call.save else ()
    device = call.x.get_device()
    tensors = (call.x, call.weight, call.bias, y, *saved)
    kind = kind_of(device, tensors[:3], "layer_norm", call.eps, call.save)
    if run(kind, device, tensors):
        return [y, *saved]
    source, stride = rows(call.x)
    if y.numel() == 0:
        return [y, *empty_statistics(saved, call.eps)]
    columns = call.x.shape[-1]
    count, tile = y.numel() // columns, tile_of(columns)
    mean, rstd = saved or (None, None)
    grid = (triton.cdiv(count, tile.rows),)
    arguments = (
        source,
        call.weight.contiguous(),
        call.bias.contiguous(),
        y,
        mean,
        rstd,
        stride,
        count,
        columns,
        call.eps,
    )
    options = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "num_warps": tile.warps}
    compiled = launch(_fwd, grid, call.x.device, *arguments, **options)
    remember(kind, tensors, Launch(_fwd, compiled, grid, arguments, options))
    return [y, *saved]


def layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx `[..., N]`, dweight and dbias `[N]` (empty unless `needs_parameters`)."""
    source, stride = rows(call.x)
    gradient, dy_stride = rows(call.dy)
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    columns = call.x.shape[-1]
    size = columns if call.needs_parameters else 0
    dweight, dbias = call.weight.new_empty(size), call.bias.new_empty(size)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    count, tile = call.mean.numel(), tile_of(columns)
    parts, each = parts_of(count, tile)
    partial = partial_sums(parts, columns, 2 if call.needs_parameters else 0, call.x.device)
    launch(
        _bwd,
        (parts,),
        call.x.device,
        *(
            gradient,
            source,
            call.weight.contiguous(),
            call.mean,
            call.rstd,
            dx,
            partial,
            dy_stride,
            stride,
            count,
            columns,
            each,
        ),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )
    sum_parts(partial, dweight, dbias)
    return dx, dweight, dbias


@triton.jit
def statistics(x, inside, columns, eps):
    """mean and rstd `[M]` of x `[M, N]`, float32 with zeros outside, and x less its mean.

    A computed mean is off by a rounding, whose square an eps of 1e-12 does not cover: what is left of the deviations'
    mean is taken off both.
    """
    mean = tl.sum(x, 1) / columns
    centred = tl.where(inside, x - mean[:, None], 0.0)
    off = tl.sum(centred, 1) / columns
    mean += off
    centred = tl.where(inside, centred - off[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / columns + eps), centred


@triton.jit
def input_gradient(dy, xhat, weight, rstd, columns):
    """rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight; xhat and dy are zero outside."""
    g = dy * weight
    return rstd[:, None] * (g - (tl.sum(g, 1) / columns)[:, None] - xhat * (tl.sum(g * xhat, 1) / columns)[:, None])


@triton.jit(do_not_specialize=["count"])
def _fwd(x, weight, bias, y, mean, rstd, stride, count, columns, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = wide_program() * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < count)[:, None] & (column < columns)[None, :]
    place = row[:, None]
    values = tl.load(x + place * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    m, r, centred = statistics(values, inside, columns, eps)
    result = centred * r[:, None] * w[None, :] + b[None, :]
    tl.store(y + place * columns + column[None, :], result.to(y.dtype.element_ty), mask=inside)
    if mean is not None:
        tl.store(mean + row, m, mask=row < count)
        tl.store(rstd + row, r, mask=row < count)


@triton.jit(do_not_specialize=["count", "each"])
def _bwd(
    dy,
    x,
    weight,
    mean,
    rstd,
    dx,
    partial,
    dy_stride,
    stride,
    count,
    columns,
    each,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = wide_program() * each
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, (tl.minimum(first + each, count) - first).to(tl.int32), BLOCK_M):
        row = first + (start + tl.arange(0, BLOCK_M))
        inside = (row < count)[:, None] & real[None, :]
        place = row[:, None]
        gradient = tl.load(dy + place * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + place * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + row, mask=row < count, other=0.0)
        r = tl.load(rstd + row, mask=row < count, other=0.0)
        xhat = tl.where(inside, (values - m[:, None]) * r[:, None], 0.0)
        result = input_gradient(gradient, xhat, w[None, :], r, columns)
        tl.store(dx + place * columns + column[None, :], result.to(dx.dtype.element_ty), mask=inside)
        if partial is not None:
            dweight += gradient * xhat
            dbias += gradient
    if partial is not None:
        mine = wide_program() * columns + column
        other = tl.num_programs(0).to(tl.int64) * columns
        tl.store(partial + mine, tl.sum(dweight, 0), mask=real)
        tl.store(partial + other + mine, tl.sum(dbias, 0), mask=real)
