"""embedding_layer_norm in Triton: look-ups, sum, LayerNorm and dropout in one pass; tables' gradients without atomics.

    ids [M]  ->  word[id] + position[place] + token_type[type], in float32  ->  y, its copy
    dy       ->  dx [M, N] of the sum, in float32; then, for every table, its tokens in the order of their rows:

    sorted rows   3 3 3 5 | 5 5 5 5 | 5 8 9 9 | 9 ..      a program walks a chunk of CHUNK tokens and adds up runs
                  `-3-'       the run of 5 crosses chunks: each chunk's share of the run that it begins with, and of
                              the run that goes on behind it, is a row of its own, added up in order by `_join`

A row out of its table's range is never read: its token's result is NaN, and it adds to no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import row_statistics

from ._launch import launch, refusal_of_rows
from ._philox import EMBEDDING_LAYER_NORM, dropout_of
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
from .dropout_add_layer_norm import dropped
from .layer_norm import input_gradient, statistics

supports = refusal_of_rows

CHUNK = 64  # tokens of a program of the scatter


class Table(NamedTuple):
    """A table `[rows, N]` or None, and its index `[M]`, or None: counted by the kernel."""

    tensor: Tensor | None
    rows: int
    index: Tensor | None


class Runs(NamedTuple):
    """A table's gradient, how many rows it has, and the one that gets none; of the tokens their row and their order.

    Attributes:
        index, order: int64 `[M]`.
        shares: float32 `[2, chunks, N]`: of every chunk its share of the run that it begins with, and of the one that
            goes on behind it.
    """

    index: Tensor
    order: Tensor
    dtable: Tensor
    shares: Tensor
    rows: int
    skip: int


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
        *_tables(call),
        *(call.weight.contiguous(), call.bias.contiguous(), y, copy if copied else None, Statistics(mean, rstd)),
        *(count, columns, call.eps, dropout_of(call.dropout_p, call.seed)),
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
        count, tile = call.mean.numel(), tile_of(columns, each=16)
        parts, each = parts_of(count, tile)
        partial = partial_sums(parts, columns, 2 if call.needs_parameters else 0, device)
        launch(
            _bwd,
            (parts,),
            device,
            *_tables(call),
            *(strided(call.dy), call.weight.contiguous(), Statistics(call.mean, call.rstd), dx, partial),
            *(count, columns, each, dropout_of(call.dropout_p, call.seed)),
            BLOCK_M=tile.rows,
            BLOCK_N=max(4, tile.columns),
            num_warps=tile.warps,
        )
        sum_parts(partial, dweight, dbias)

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


def _tables(call: Any) -> tuple[Table, Table, Table, int]:
    """word, token type and position, and T."""
    ids = call.input_ids

    def one(table: Tensor | None, index: Tensor | None) -> Table:
        if table is None:
            return Table(None, 0, None)
        return Table(table.contiguous(), table.shape[0], None if index is None else _flat(index, ids))

    return (
        one(call.word, ids),
        one(call.token_type, call.token_type_ids),
        one(call.position, call.position_ids),
        ids.shape[-1],
    )


def _scatter(dx: Tensor, index: Tensor, dtable: Tensor, skip: int) -> None:
    """dtable[index[m]] += dx[m], rows of one index in their order; not for row `skip` or outside of the table."""
    count, columns = dx.shape
    chunks = triton.cdiv(count, CHUNK)
    shares = torch.empty(2, chunks, columns, dtype=torch.float32, device=dx.device)
    runs = Runs(index, index.argsort(stable=True), dtable, shares, dtable.shape[0], skip)
    block = min(512, max(32, triton.next_power_of_2(columns)))
    grid = (chunks, triton.cdiv(columns, block))
    options = {"CHUNK": CHUNK, "BLOCK_N": block, "num_warps": 4}
    launch(_add_runs, grid, dx.device, dx, runs, count, columns, **options)
    launch(_join, grid, dx.device, runs, count, columns, chunks, **options)


@triton.jit
def _row_of(table, token, there):
    """A token's row of a table, and whether it is one."""
    row = tl.load(table.index + token, mask=there, other=0).to(tl.int64)
    good = (row >= 0) & (row < table.rows)
    return tl.where(good, row, 0), good


@triton.jit
def _load_table(table, row, inside, columns, BLOCK_N: tl.constexpr):
    """Rows `[M]` of a table, `[M, N]` in float32."""
    place = table.tensor + row[:, None] * columns + tl.arange(0, BLOCK_N)[None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sums(word, token_type, position, length, token, inside, count, columns, BLOCK_N: tl.constexpr):
    """word + position + token type of tokens `[M]` in float32, and whether all of their rows are there."""
    there = token < count
    row, good = _row_of(word, token, there)
    x = _load_table(word, row, inside, columns, BLOCK_N)
    if position.tensor is not None:
        if position.index is not None:
            row, fits = _row_of(position, token, there)
            good = good & fits
        else:
            row = token % length
        x += _load_table(position, row, inside, columns, BLOCK_N)
    if token_type.tensor is not None:
        row = tl.zeros_like(token)
        if token_type.index is not None:
            row, fits = _row_of(token_type, token, there)
            good = good & fits
        x += _load_table(token_type, row, inside, columns, BLOCK_N)
    return x, good


@triton.jit(do_not_specialize=["length", "count"])
def _fwd(
    word,
    token_type,
    position,
    length,
    weight,
    bias,
    y,
    copy,
    saved,
    count,
    columns,
    eps,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = wide_program() * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    real = column < columns
    inside = (token < count)[:, None] & real[None, :]
    x, good = _sums(word, token_type, position, length, token, inside, count, columns, BLOCK_N)
    w = load_parameter(weight, columns, BLOCK_N)
    b = load_parameter(bias, columns, BLOCK_N)
    m, r, centred = statistics(x, inside, columns, eps)
    result = centred * r[:, None] * w[None, :] + b[None, :]
    if dropout.seed is not None:
        result = dropped(result, token, dropout, EMBEDDING_LAYER_NORM, BLOCK_N)
    result = tl.where(good[:, None], result, float("nan"))
    target = token[:, None] * columns + column[None, :]
    tl.store(y + target, result.to(y.dtype.element_ty), mask=inside)
    if copy is not None:
        tl.store(copy + target, result.to(copy.dtype.element_ty), mask=inside)
    store_statistics(saved, token, count, m, r)


@triton.jit(do_not_specialize=["length", "count", "each"])
def _bwd(
    word,
    token_type,
    position,
    length,
    dy,
    weight,
    saved,
    dx,
    partial,
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
    for start in range(0, (tl.minimum(first + each, count) - first).to(tl.int32), BLOCK_M):
        token = first + (start + tl.arange(0, BLOCK_M))
        inside = (token < count)[:, None] & real[None, :]
        x, good = _sums(word, token_type, position, length, token, inside, count, columns, BLOCK_N)
        # A token without a row adds nothing.
        taken = inside & good[:, None]
        gradient = load_tile(dy, token[:, None], taken, BLOCK_N)
        if dropout.seed is not None:
            gradient = dropped(gradient, token, dropout, EMBEDDING_LAYER_NORM, BLOCK_N)
            gradient = tl.where(taken, gradient, 0.0)
        m, r = load_statistics(saved, token, count)
        xhat = tl.where(inside, (x - m[:, None]) * r[:, None], 0.0)
        result = input_gradient(gradient, xhat, w[None, :], r, columns)
        tl.store(dx + token[:, None] * columns + column[None, :], result, mask=inside)
        if partial is not None:
            dweight += gradient * xhat
            dbias += gradient
    if partial is not None:
        mine = wide_program() * columns + column
        other = tl.num_programs(0).to(tl.int64) * columns
        tl.store(partial + mine, tl.sum(dweight, 0), mask=real)
        tl.store(partial + other + mine, tl.sum(dbias, 0), mask=real)


@triton.jit
def _sorted_row(runs, at, count):
    """The table's row of the token that is at this place of the order; -2 before the first, -3 behind the last."""
    there = (at >= 0) & (at < count)
    token = tl.load(runs.order + at, mask=there, other=0)
    row = tl.load(runs.index + token, mask=there, other=0).to(tl.int64)
    return tl.where(there, row, tl.where(at < 0, -2, -3))


@triton.jit(do_not_specialize=["count"])
def _add_runs(dx, runs, count, columns, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The runs of a chunk: those within it to the table, the first and last share of longer ones to the shares."""
    chunk = wide_program()
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < columns
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, count)
    sum = tl.zeros((BLOCK_N,), tl.float32)
    before = _sorted_row(runs, first - 1, count)
    mine = runs.shares + chunk * columns + column
    behind = mine + tl.num_programs(0).to(tl.int64) * columns
    row = _sorted_row(runs, first, count)
    # Whether the run that is being added up began in a chunk before.
    goes_on = row == before
    for at in range(first, last):
        token = tl.load(runs.order + at).to(tl.int64)
        sum += tl.load(dx + token * columns + column, mask=real, other=0.0)
        following = _sorted_row(runs, at + 1, count)
        if (following != row) | (at + 1 == last):
            # The end of a run, or of what this chunk has of it.
            if goes_on:
                tl.store(mine, sum, mask=real)
            elif following == row:
                tl.store(behind, sum, mask=real)
            elif (row >= 0) & (row < runs.rows) & (row != runs.skip):
                tl.store(runs.dtable + row * columns + column, sum.to(runs.dtable.dtype.element_ty), mask=real)
            sum = tl.zeros((BLOCK_N,), tl.float32)
            goes_on = False
        row = following


@triton.jit(do_not_specialize=["count", "chunks"])
def _join(runs, count, columns, chunks, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The run that begins in this chunk and goes on behind it: the sum of all chunks' shares, in order."""
    chunk = wide_program()
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < columns
    first = chunk * CHUNK
    end = first + CHUNK
    row = _sorted_row(runs, end - 1, count)
    crosses = (row == _sorted_row(runs, end, count)) & (end < count)
    # A run that fills the chunk and began before belongs to where it began.
    whole = (_sorted_row(runs, first, count) == row) & (_sorted_row(runs, first - 1, count) == row)
    if crosses & (whole == 0) & (row >= 0) & (row < runs.rows) & (row != runs.skip):
        sum = tl.load(runs.shares + (chunks + chunk) * columns + column, mask=real, other=0.0)
        at = chunk + 1
        more = True
        while more:
            sum += tl.load(runs.shares + at * columns + column, mask=real, other=0.0)
            at += 1
            next_first = at * CHUNK
            # Goes on as long as a chunk begins with the row that the one before ends with.
            more = (next_first < count) & (_sorted_row(runs, next_first, count) == row)
        tl.store(runs.dtable + row * columns + column, sum.to(runs.dtable.dtype.element_ty), mask=real)
