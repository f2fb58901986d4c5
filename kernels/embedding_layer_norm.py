"""embedding_layer_norm in Triton: look-ups, sum, LayerNorm and dropout in one pass; tables' gradients without atomics.

    ids [M]  ->  word[id] + position[place] + token_type[type], in float32  ->  y, its copy
    dy       ->  dx [M, N] of the sum, in float32; then, for every table, its tokens in the order of their rows:

    sorted rows   3 3 3 5 | 5 5 5 5 | 5 8 9 9 | 9 ..      a program walks a chunk of CHUNK tokens and adds up runs
                  `-3-'       the run of 5 crosses chunks: each chunk's share of the run that it begins with, and of
                              the run that goes on behind it, is a row of its own, added up in order by `_join`

A row out of its table's range is never read: its token's result is NaN, and it adds to no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import row_statistics, rows

from ._launch import launch, refusal_of_rows
from ._philox import EMBEDDING_LAYER_NORM, dropout_numbers
from ._rows import partial_sums, parts_of, sum_parts, tile_of
from .dropout_add_layer_norm import dropped
from .layer_norm import input_gradient, statistics

supports = refusal_of_rows

CHUNK = 64  # tokens of a program of the scatter


def embedding_layer_norm_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[..., N]`; its copy in `copy_dtype` (empty without one); mean and rstd `[...]`."""
    columns, device = call.word.shape[-1], call.word.device
    shape = (*call.input_ids.shape, columns)
    y = torch.empty(shape, dtype=call.out_dtype, device=device)
    copied = call.copy_dtype is not None
    copy = torch.empty(shape if copied else (0,), dtype=call.copy_dtype or call.out_dtype, device=device)
    mean, rstd = row_statistics(y)
    if y.numel() == 0:
        return y, copy, mean.zero_(), rstd.zero_()
    count, tile = mean.numel(), tile_of(columns)
    launch(
        _fwd,
        (triton.cdiv(count, tile.rows),),
        device,
        *_tables(call.input_ids, call.word, call.token_type, call.position, call.token_type_ids, call.position_ids),
        *(
            call.weight.contiguous(),
            call.bias.contiguous(),
            y,
            copy if copied else None,
            mean,
            rstd,
            count,
            columns,
            call.eps,
        ),
        *(None if call.dropout_p == 0.0 else call.seed, *dropout_numbers(call.dropout_p)),
        BLOCK_M=tile.rows,
        BLOCK_N=max(4, tile.columns),
        num_warps=tile.warps,
    )
    return y, copy, mean, rstd


def embedding_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dword, dtoken_type, dposition, dweight, dbias; empty where one is not needed."""
    columns, device = call.word.shape[-1], call.word.device
    dweight, dbias = (one.new_empty(columns if call.needs_parameters else 0) for one in (call.weight, call.bias))
    dx = torch.empty(call.mean.numel(), columns, dtype=torch.float32, device=device)
    if dx.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        gradient, stride = rows(call.dy)
        count, tile = call.mean.numel(), tile_of(columns, each=16)
        parts, each = parts_of(count, tile)
        partial = partial_sums(parts, columns, 2, device) if call.needs_parameters else None
        launch(
            _bwd,
            (parts,),
            device,
            *_tables(call.input_ids, call.word, call.token_type, call.position, call.token_type_ids, call.position_ids),
            *(gradient, stride, call.weight.contiguous(), call.mean, call.rstd, dx, partial, count, columns, each),
            *(None if call.dropout_p == 0.0 else call.seed, *dropout_numbers(call.dropout_p)),
            BLOCK_M=tile.rows,
            BLOCK_N=max(4, tile.columns),
            num_warps=tile.warps,
        )
        if call.needs_parameters:
            sum_parts(partial[0], dweight)
            sum_parts(partial[1], dbias)

    def scatter(table: Tensor | None, needed: bool, index: Tensor | None, skip: int = -1) -> Tensor:
        if table is None or not needed:
            return call.word.new_empty(0)
        dtable = torch.zeros(table.shape, dtype=table.dtype, device=device)
        if dx.numel() > 0:
            if index is None:
                index = torch.zeros_like(call.input_ids)
            _scatter(dx, _flat(index, call.input_ids), dtable, skip)
        return dtable

    places = call.position_ids
    if places is None and call.needs_position:
        places = torch.arange(call.input_ids.shape[-1], device=device)
    return (
        scatter(call.word, call.needs_word, call.input_ids, call.padding_idx),
        scatter(call.token_type, call.needs_token_type, call.token_type_ids),
        scatter(call.position, call.needs_position, places),
        dweight,
        dbias,
    )


def _flat(ids: Tensor, like: Tensor) -> Tensor:
    return ids.expand(like.shape).reshape(-1).contiguous()


def _tables(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor | int | None, ...]:
    """Each table, its rows and its index `[M]` (None: counted by the kernel), and T."""

    def one(table: Tensor | None, index: Tensor | None) -> tuple[Tensor | None, int, Tensor | None]:
        if table is None:
            return None, 0, None
        return table.contiguous(), table.shape[0], None if index is None else _flat(index, input_ids)

    return (
        *one(word, input_ids),
        *one(token_type, token_type_ids),
        *one(position, position_ids),
        input_ids.shape[-1],
    )


def _scatter(dx: Tensor, index: Tensor, dtable: Tensor, skip: int) -> None:
    """dtable[index[m]] += dx[m], rows of one index in their order; not for row `skip` or outside of the table."""
    count, columns = dx.shape
    order = index.argsort(stable=True)
    chunks = triton.cdiv(count, CHUNK)
    # Of every chunk its share of the run that it begins with, and of the one that goes on behind it.
    shares = torch.empty(2, chunks, columns, dtype=torch.float32, device=dx.device)
    block = min(512, max(32, triton.next_power_of_2(columns)))
    grid = (chunks, triton.cdiv(columns, block))
    arguments = (index, order, dtable, shares, count, columns, dtable.shape[0], skip)
    options = {"CHUNK": CHUNK, "BLOCK_N": block, "num_warps": 4}
    launch(_add_runs, grid, dx.device, dx, *arguments, **options)
    launch(_join, grid, dx.device, *arguments, chunks, **options)


@triton.jit
def _row_of(index, token, there, size):
    """A token's row of a table of `size`, and whether it is one."""
    row = tl.load(index + token, mask=there, other=0).to(tl.int64)
    good = (row >= 0) & (row < size)
    return tl.where(good, row, 0), good


@triton.jit
def _sums(
    word,
    words,
    word_index,
    token_type,
    types,
    type_index,
    position,
    positions,
    position_index,
    length,
    token,
    column,
    inside,
    count,
    columns,
):
    """word + position + token type of tokens `[M]` in float32, and whether all of their rows are there."""
    there = token < count
    row, good = _row_of(word_index, token, there, words)
    x = tl.load(word + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if position is not None:
        if position_index is not None:
            row, fits = _row_of(position_index, token, there, positions)
            good = good & fits
        else:
            row = token % length
        x += tl.load(position + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if token_type is not None:
        row = tl.zeros_like(token)
        if type_index is not None:
            row, fits = _row_of(type_index, token, there, types)
            good = good & fits
        x += tl.load(token_type + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return x, good


@triton.jit
def _fwd(
    word,
    words,
    word_index,
    token_type,
    types,
    type_index,
    position,
    positions,
    position_index,
    length,
    weight,
    bias,
    y,
    copy,
    mean,
    rstd,
    count,
    columns,
    eps,
    seed,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    inside = (token < count)[:, None] & real[None, :]
    x, good = _sums(
        word, words, word_index, token_type, types, type_index, position, positions, position_index, length,
        token, column, inside, count, columns,
    )  # fmt: skip
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    m, r, centred = statistics(x, inside, columns, eps)
    result = centred * r[:, None] * w[None, :] + b[None, :]
    if seed is not None:
        result = dropped(result, token, seed, threshold, keep_scale, EMBEDDING_LAYER_NORM, BLOCK_N)
    result = tl.where(good[:, None], result, float("nan"))
    target = token[:, None] * columns + column[None, :]
    tl.store(y + target, result.to(y.dtype.element_ty), mask=inside)
    if copy is not None:
        tl.store(copy + target, result.to(copy.dtype.element_ty), mask=inside)
    tl.store(mean + token, m, mask=token < count)
    tl.store(rstd + token, r, mask=token < count)


@triton.jit
def _bwd(
    word,
    words,
    word_index,
    token_type,
    types,
    type_index,
    position,
    positions,
    position_index,
    length,
    dy,
    dy_stride,
    weight,
    mean,
    rstd,
    dx,
    partial,
    count,
    columns,
    each,
    seed,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * each
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + each, count), BLOCK_M):
        token = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (token < count)[:, None] & real[None, :]
        x, good = _sums(
            word, words, word_index, token_type, types, type_index, position, positions, position_index, length,
            token, column, inside, count, columns,
        )  # fmt: skip
        # A token without a row adds nothing.
        taken = inside & good[:, None]
        gradient = tl.load(dy + token[:, None] * dy_stride + column[None, :], mask=taken, other=0.0).to(tl.float32)
        if seed is not None:
            gradient = dropped(gradient, token, seed, threshold, keep_scale, EMBEDDING_LAYER_NORM, BLOCK_N)
            gradient = tl.where(taken, gradient, 0.0)
        m = tl.load(mean + token, mask=token < count, other=0.0)
        r = tl.load(rstd + token, mask=token < count, other=0.0)
        xhat = tl.where(inside, (x - m[:, None]) * r[:, None], 0.0)
        result = input_gradient(gradient, xhat, w[None, :], r, columns)
        tl.store(dx + token[:, None] * columns + column[None, :], result, mask=inside)
        if partial is not None:
            dweight += gradient * xhat
            dbias += gradient
    if partial is not None:
        mine = tl.program_id(0).to(tl.int64) * columns + column
        other = tl.num_programs(0).to(tl.int64) * columns
        tl.store(partial + mine, tl.sum(dweight, 0), mask=real)
        tl.store(partial + other + mine, tl.sum(dbias, 0), mask=real)


@triton.jit
def _sorted_row(index, order, at, count):
    """The table's row of the token that is at this place of the order; -2 before the first, -3 behind the last."""
    there = (at >= 0) & (at < count)
    token = tl.load(order + at, mask=there, other=0)
    row = tl.load(index + token, mask=there, other=0).to(tl.int64)
    return tl.where(there, row, tl.where(at < 0, -2, -3))


@triton.jit
def _add_runs(
    dx,
    index,
    order,
    dtable,
    shares,
    count,
    columns,
    size,
    skip,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The runs of a chunk: those within it to the table, the first and last share of longer ones to `shares`."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < columns
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, count)
    sum = tl.zeros((BLOCK_N,), tl.float32)
    before = _sorted_row(index, order, first - 1, count)
    mine = shares + chunk.to(tl.int64) * columns + column
    behind = mine + tl.num_programs(0).to(tl.int64) * columns
    row = _sorted_row(index, order, first, count)
    # Whether the run that is being added up began in a chunk before.
    goes_on = row == before
    for at in range(first, last):
        token = tl.load(order + at).to(tl.int64)
        sum += tl.load(dx + token * columns + column, mask=real, other=0.0)
        following = _sorted_row(index, order, at + 1, count)
        if (following != row) | (at + 1 == last):
            # The end of a run, or of what this chunk has of it.
            if goes_on:
                tl.store(mine, sum, mask=real)
            elif following == row:
                tl.store(behind, sum, mask=real)
            elif (row >= 0) & (row < size) & (row != skip):
                tl.store(dtable + row * columns + column, sum.to(dtable.dtype.element_ty), mask=real)
            sum = tl.zeros((BLOCK_N,), tl.float32)
            goes_on = False
        row = following


@triton.jit
def _join(
    index,
    order,
    dtable,
    shares,
    count,
    columns,
    size,
    skip,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The run that begins in this chunk and goes on behind it: the sum of all chunks' shares, in order."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < columns
    first = chunk * CHUNK
    end = first + CHUNK
    row = _sorted_row(index, order, end - 1, count)
    crosses = (row == _sorted_row(index, order, end, count)) & (end < count)
    # A run that fills the chunk and began before belongs to where it began.
    whole = (_sorted_row(index, order, first, count) == row) & (_sorted_row(index, order, first - 1, count) == row)
    if crosses & (whole == 0) & (row >= 0) & (row < size) & (row != skip):
        sum = tl.load(shares + (chunks + chunk).to(tl.int64) * columns + column, mask=real, other=0.0)
        at = chunk + 1
        more = True
        while more:
            sum += tl.load(shares + at.to(tl.int64) * columns + column, mask=real, other=0.0)
            at += 1
            next_first = at * CHUNK
            # Goes on as long as a chunk begins with the row that the one before ends with.
            more = (next_first < count) & (_sorted_row(index, order, next_first, count) == row)
        tl.store(dtable + row * columns + column, sum.to(dtable.dtype.element_ty), mask=real)
