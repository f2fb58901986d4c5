"""bias_gelu in Triton: tiles of rows, each element once; the bias gradient in two stages.

    x [M, N] + bias [N]  ->  z  ->  z g(z), g the share that passes
    dy, x    [M, N]      ->  dx = dy (g + z g'), added up over a program's rows, and `sum_parts` adds the programs' sums

The exact gate is Phi(z) = erfc(-z / sqrt 2) / 2.  Far below zero 1 + erf has no digits left, so erfc is computed as
exp(-z^2 / 2) times a polynomial of 1 / (1 + z / 2) there: Press et al., "Numerical Recipes", 2nd ed., section 6.2
(`erfcc`), relative error below 1.2e-7 everywhere.
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
def _erfc(x):
    """erfc of x >= 0."""
    t = 1.0 / (1.0 + 0.5 * x)
    p = 0.17087277 * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    p = p * t - 1.26551223
    return t * tl.exp(p - x * x)


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
        # erf near zero, where it is exact; erfc in the tail, where 1 + erf is not.
        size = tl.abs(near) * 0.7071067811865476
        tail = 0.5 * _erfc(size)
        far = tl.where(near < 0.0, tail, 1.0 - tail)
        gate = tl.where(size < 1.0, 0.5 + 0.5 * tl.erf(near * 0.7071067811865476), far)
        slope = 0.3989422804014327 * tl.exp(-0.5 * near * near)
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
