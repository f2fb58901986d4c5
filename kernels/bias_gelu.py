"""bias_gelu in Triton: tiles of rows, each element once; the bias gradient in two stages.

    x [M, N] + bias [N]  ->  z  ->  z g(z), g the share that passes
    dy, x    [M, N]      ->  dx = dy (g + z g'), added up over a program's rows, and `sum_parts` adds the programs' sums

The exact gate is Phi(z).  Far below zero 1 + erf has no digits left, so the tail Q(a) = Phi(-a) is exp(-a^2 / 2) t P(t)
with t = 1 / (1 + 0.34 a) and P a minimax polynomial, relative error 4e-8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import rows

from ._launch import launch, refusal_of_rows
from ._rows import partial_sums, parts_of, sum_parts, tile_of

supports = refusal_of_rows

# As in the reference: past it the gate is 0 or 1 and its slope 0.
FAR = tl.constexpr(50.0)


def bias_gelu_fwd(call: Any) -> Tensor:
    """y `[..., N]` in x's dtype."""
    source, stride = rows(call.x)
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    columns = call.x.shape[-1]
    count, tile = y.numel() // columns, tile_of(columns)
    bias = None if call.bias is None else call.bias.contiguous()
    launch(
        _fwd,
        (triton.cdiv(count, tile.rows),),
        call.x.device,
        *(source, bias, y, stride, count, columns),
        TANH=call.approximate == "tanh",
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )
    return y


def bias_gelu_bwd(call: Any) -> tuple[Tensor, Tensor]:
    """dx `[..., N]` in x's dtype and dbias `[N]` in bias's (empty unless `needs_bias`)."""
    source, x_stride = rows(call.x)
    gradient, dy_stride = rows(call.dy)
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    columns = call.x.shape[-1]
    dbias = (call.x if call.bias is None else call.bias).new_empty(columns if call.needs_bias else 0)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    count, tile = dx.numel() // columns, tile_of(columns)
    parts, each = parts_of(count, tile)
    partial = partial_sums(parts, columns, 1 if call.needs_bias else 0, call.x.device)
    launch(
        _bwd,
        (parts,),
        call.x.device,
        *(gradient, source, None if call.bias is None else call.bias.contiguous(), dx, partial),
        *(dy_stride, x_stride, count, columns, each),
        TANH=call.approximate == "tanh",
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )
    sum_parts(partial, dbias)
    return dx, dbias


@triton.jit
def _argument(x, bias, row, column, inside, stride, columns):
    """z = x + bias, not below -FAR, where an infinite one would be NaN times a gate of 0."""
    z = tl.load(x + row * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    # Not a maximum, which would make a number of a NaN.
    return tl.where(z < -FAR, -FAR, z)


@triton.jit
def _tail(a):
    """The upper tail of the normal distribution, Q(a), and exp(-a^2 / 2), of a >= 0."""
    density = tl.exp(-0.5 * a * a)
    t = 1.0 / (1.0 + 0.34 * a)
    p = -0.0261207055 * t + 0.139500499
    p = p * t - 0.273134589
    p = p * t + 0.202184513
    p = p * t - 0.0447195619
    p = p * t + 0.115359567
    p = p * t + 0.115197577
    p = p * t + 0.136112213
    p = p * t + 0.135620505
    return p * t * density, density


@triton.jit
def _gates(z, TANH: tl.constexpr):
    """g with gelu(z) = z g(z), and its derivative."""
    near = tl.where(z > FAR, FAR, z)
    if TANH:
        # sqrt(8 / pi)
        u = 1.5957691216057308 * (near + 0.044715 * near * near * near)
        gate = 1.0 / (1.0 + tl.exp(-u))
        slope = gate * (1.0 / (1.0 + tl.exp(u))) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    else:
        tail, density = _tail(tl.abs(near))
        gate = tl.where(near < 0.0, tail, 1.0 - tail)
        slope = 0.3989422804014327 * density
    return gate, slope


@triton.jit(do_not_specialize=["count"])
def _fwd(x, bias, y, stride, count, columns, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < count)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64)
    z = _argument(x, bias, place, column, inside, stride, columns)
    gate, _slope = _gates(z, TANH)
    tl.store(y + place * columns + column[None, :], (z * gate).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "each"])
def _bwd(
    dy,
    x,
    bias,
    dx,
    partial,
    dy_stride,
    stride,
    count,
    columns,
    each,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * each
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + each, count), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < count)[:, None] & real[None, :]
        place = row[:, None].to(tl.int64)
        gradient = tl.load(dy + place * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        z = _argument(x, bias, place, column, inside, stride, columns)
        gate, slope = _gates(z, TANH)
        result = gradient * (gate + tl.where(z > FAR, FAR, z) * slope)
        tl.store(dx + place * columns + column[None, :], result.to(dx.dtype.element_ty), mask=inside)
        if partial is not None:
            dbias += tl.where(inside, result, 0.0)
    if partial is not None:
        mine = partial + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(mine, tl.sum(dbias, 0), mask=real)
