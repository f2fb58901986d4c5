"""dropout_add_layer_norm in Triton: a program takes a few rows, whole, in one pass each way.

    x, residual [M, N]  ->  s = residual + dropout(x + x_bias), rounded only where it is stored  ->  y, its copy
    dy, s       [M, N]  ->  ds; dresidual = ds, dx = dropout's mask on ds; the sums over a program's rows of
                            dy * xhat, dy and dx, which `sum_parts` adds up

Backward draws dropout's bits again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import empty_statistics, row_statistics

from ._launch import launch, refusal_of_rows
from ._philox import DROPOUT_ADD_LAYER_NORM, dropout_of, keep
from ._rows import (
    Statistics,
    load_parameter,
    load_statistics,
    load_tile,
    partial_sums,
    parts_of,
    store_statistics,
    strided,
    sum_parts,
    tile_of,
    wide_program,
)
from .layer_norm import input_gradient, statistics

supports = refusal_of_rows


def dropout_add_layer_norm_fwd(call: Any) -> list[Tensor]:
    """y `[..., N]` in residual's dtype; unless `copy_dtype` is None its copy; where `save`, s, mean and rstd."""
    y = torch.empty_like(call.residual, memory_format=torch.contiguous_format)
    copy = None if call.copy_dtype is None else torch.empty_like(y, dtype=call.copy_dtype)
    outputs = [y] if copy is None else [y, copy]
    saved = (torch.empty_like(y), *row_statistics(call.x)) if call.save else ()
    if y.numel() == 0:
        empty_statistics(saved[1:], call.eps)
        return [*outputs, *saved]
    columns = call.x.shape[-1]
    count, tile = y.numel() // columns, tile_of(columns)
    x_bias = None if call.x_bias is None else call.x_bias.contiguous()
    launch(
        _fwd,
        (triton.cdiv(count, tile.rows),),
        call.x.device,
        *(strided(call.x), x_bias, strided(call.residual), call.weight.contiguous(), call.bias.contiguous()),
        *(y, copy, saved[0] if saved else None, Statistics(*(saved[1:] or (None, None)))),
        *(count, columns, call.eps, dropout_of(call.dropout_p, call.seed)),
        BLOCK_M=tile.rows,
        BLOCK_N=max(4, tile.columns),
        num_warps=tile.warps,
    )
    return [*outputs, *saved]


def dropout_add_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in `x_dtype`, dresidual, dweight, dbias, dx_bias; what is not needed is empty."""
    columns = call.s.shape[-1]
    dx = torch.empty_like(call.s, dtype=call.x_dtype) if call.needs_x else call.s.new_empty(0, dtype=call.x_dtype)
    dresidual = torch.empty_like(call.s) if call.needs_residual else call.s.new_empty(0)
    dweight, dbias = (one.new_empty(columns if call.needs_parameters else 0) for one in (call.weight, call.bias))
    dx_bias = (call.s if call.x_bias is None else call.x_bias).new_empty(columns if call.needs_x_bias else 0)
    if call.s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dx_bias.zero_()
    count, tile = call.mean.numel(), tile_of(columns, each=16)
    parts, each = parts_of(count, tile)
    outs = (dweight, dbias) if call.needs_parameters else ()
    outs += (dx_bias,) if call.needs_x_bias else ()
    sums = partial_sums(parts, columns, len(outs), call.s.device)
    partial = sums if call.needs_parameters else None
    partial_bias = sums[-1:] if call.needs_x_bias else None
    launch(
        _bwd,
        (parts,),
        call.s.device,
        *(strided(call.dy), strided(call.dy_copy), call.s, call.weight.contiguous(), Statistics(call.mean, call.rstd)),
        *(dx if call.needs_x else None, dresidual if call.needs_residual else None, partial, partial_bias),
        *(count, columns, each, dropout_of(call.dropout_p, call.seed)),
        BLOCK_M=tile.rows,
        BLOCK_N=max(4, tile.columns),
        num_warps=tile.warps,
    )
    sum_parts(sums, *outs)
    return dx, dresidual, dweight, dbias, dx_bias


@triton.jit
def dropped(x, row, dropout, tag: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout of rows `[M, N]`: counter (column // 4, row, row >> 32)."""
    block = tl.arange(0, BLOCK_N // 4)[None, :]
    low = row.to(tl.int32)[:, None]
    high = (row >> 32).to(tl.int32)[:, None]
    kept = keep(tl.load(dropout.seed), block, low, high, tag, dropout.threshold)
    return tl.where(kept, x * dropout.keep_scale, 0.0)


@triton.jit(do_not_specialize=["count"])
def _fwd(
    x,
    x_bias,
    residual,
    weight,
    bias,
    y,
    copy,
    s,
    saved,
    count,
    columns,
    eps,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = wide_program() * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    inside = (row < count)[:, None] & real[None, :]
    place = row[:, None]
    branch = load_tile(x, place, inside, BLOCK_N)
    if x_bias is not None:
        branch += load_parameter(x_bias, columns, BLOCK_N)[None, :]
    if dropout.seed is not None:
        branch = dropped(branch, row, dropout, DROPOUT_ADD_LAYER_NORM, BLOCK_N)
    stream = load_tile(residual, place, inside, BLOCK_N)
    total = tl.where(inside, stream + branch, 0.0)
    w = load_parameter(weight, columns, BLOCK_N)
    b = load_parameter(bias, columns, BLOCK_N)
    _mean, r, centred = statistics(total, inside, columns, eps)
    result = centred * r[:, None] * w[None, :] + b[None, :]
    target = place * columns + column[None, :]
    tl.store(y + target, result.to(y.dtype.element_ty), mask=inside)
    if copy is not None:
        tl.store(copy + target, result.to(copy.dtype.element_ty), mask=inside)
    if s is not None:
        # What backward sees is what is stored.
        stored = total.to(s.dtype.element_ty)
        tl.store(s + target, stored, mask=inside)
        m, r, centred = statistics(stored.to(tl.float32), inside, columns, eps)
        store_statistics(saved, row, count, m, r)


@triton.jit(do_not_specialize=["count", "each"])
def _bwd(
    dy,
    dy_copy,
    s,
    weight,
    saved,
    dx,
    dresidual,
    partial,
    partial_bias,
    count,
    columns,
    each,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = wide_program() * each
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    w = load_parameter(weight, columns, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, (tl.minimum(first + each, count) - first).to(tl.int32), BLOCK_M):
        row = first + (start + tl.arange(0, BLOCK_M))
        inside = (row < count)[:, None] & real[None, :]
        place = row[:, None]
        target = place * columns + column[None, :]
        gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if dy.tensor is not None:
            gradient += load_tile(dy, place, inside, BLOCK_N)
        if dy_copy.tensor is not None:
            gradient += load_tile(dy_copy, place, inside, BLOCK_N)
        values = tl.load(s + target, mask=inside, other=0.0).to(tl.float32)
        m, r = load_statistics(saved, row, count)
        xhat = tl.where(inside, (values - m[:, None]) * r[:, None], 0.0)
        ds = input_gradient(gradient, xhat, w[None, :], r, columns)
        if dresidual is not None:
            tl.store(dresidual + target, ds.to(dresidual.dtype.element_ty), mask=inside)
        if (dx is not None) or (partial_bias is not None):
            branch = ds
            if dropout.seed is not None:
                branch = dropped(ds, row, dropout, DROPOUT_ADD_LAYER_NORM, BLOCK_N)
            if dx is not None:
                tl.store(dx + target, branch.to(dx.dtype.element_ty), mask=inside)
            if partial_bias is not None:
                dx_bias += tl.where(inside, branch, 0.0)
        if partial is not None:
            dweight += gradient * xhat
            dbias += gradient
    mine = wide_program() * columns + column
    if partial is not None:
        other = tl.num_programs(0).to(tl.int64) * columns
        tl.store(partial + mine, tl.sum(dweight, 0), mask=real)
        tl.store(partial + other + mine, tl.sum(dbias, 0), mask=real)
    if partial_bias is not None:
        tl.store(partial_bias + mine, tl.sum(dx_bias, 0), mask=real)
