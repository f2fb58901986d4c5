"""A tile of relative attention's scores, forward and backward: its queries, what they may see, the scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._attention import INFINITY, UNIFORM_SCORE, UNSEEN_RANK, Broadcast, Rows, Sizes, count, load_rows, number, some
from ._philox import Dropout
from ._products import row_products

# Records that kernels take.


class Table(NamedTuple):
    """The position table `[G, R, H, D]` as an address with strides over table, row and head.

    Attributes:
        rows: R, `coded`.
        offset: query i meets key j at row offset + j - i; `coded`.
        sequences: how many follow each other with the same table, `coded`.
    """

    tensor: Tensor
    table: int
    row: int
    head: int
    rows: int
    offset: int
    sequences: int


class Biases(NamedTuple):
    """u, v and the segments' bias `[H, D]`, and the segments' embedding `[2, H, D]`; each may be None."""

    content: Tensor | None
    position: Tensor | None
    segment: Tensor | None
    embedding: Tensor | None


class Marks(NamedTuple):
    """int32 numbers of queries `[B, Tq]` and of keys `[B, Tk]`, or packed; each may be None.

    Attributes:
        positions: where each query stands, -1 for one without a place, in rising order.
        numbers: the numbers that the queries had before they were sorted by position.
        query_segments, key_segments, query_rank, key_rank: as the op takes them, the queries' sorted.
    """

    positions: Tensor | None
    numbers: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    query_rank: Tensor | None
    key_rank: Tensor | None


class Call(NamedTuple):
    """What every kernel begins with: one stream of a call, forward or backward."""

    query: Rows
    key: Rows
    value: Rows
    table: Table
    biases: Biases
    marks: Marks
    mask: Broadcast
    sizes: Sizes
    scale: float
    dropout: Dropout


class Options(NamedTuple):
    """What every kernel is compiled for, beside its tile.

    Attributes:
        causal, uniform_rows: as in `Shared` of `pyxlbert.launch.relative`, the others as in its `StreamOptions`.
        empty: whether some row may see nothing and be no average either.
    """

    causal: bool
    uniform_rows: bool
    see_self: bool
    mask_by_position: bool
    tag: int
    empty: bool


# Records of a tile.


class Lines(NamedTuple):
    """BLOCK_M queries: what `query_lines` returns.

    Attributes:
        first: the row of the first.
        number, position, there: of each `[M]` its number and position, and whether it is there at all.
        top, bottom: the largest and the smallest position.
        rank, highest, lowest: of each `[M]` its rank, and the largest and the smallest.
        mask_row: of each `[M]` the row of the mask.
    """

    first: Any
    number: Any
    position: Any
    there: Any
    top: Any
    bottom: Any
    rank: Any
    highest: Any
    lowest: Any
    mask_row: Any


class Queries(NamedTuple):
    """A tile of queries: what `load_queries` returns.

    Attributes:
        content, position: `[M, BLOCK_D]` with the content and with the position bias.
        same, other: their products `[M]` with the embeddings of the same and of the other segment.
        segment: their segments `[M]`.
    """

    content: Any
    position: Any
    same: Any
    other: Any
    segment: Any


@triton.jit
def numbers_before(rows, call, at):
    """How many numbers of `[B, rows]`, the rows `coded`, or packed, stand before a sequence's."""
    if call.sizes.cu_seqlens is not None:
        return at.start
    else:
        return at.b * number(rows)


@triton.jit
def first_table_row(table, at):
    """The address of the first row of a plane's table."""
    return table.tensor + ((at.b // number(table.sequences)) * table.table + at.h * table.head)


@triton.jit
def readable_keys(at, OPTIONS: tl.constexpr):
    """How many keys and values of a plane are read: all where a row without any key averages over all of them."""
    return at.extent if OPTIONS.uniform_rows else at.keys


@triton.jit
def hiding_ranks(call, at, OPTIONS: tl.constexpr):
    """The ranks by which some of these are not read, or None."""
    if call.marks.key_rank is not None and not OPTIONS.uniform_rows:
        return call.marks.key_rank + numbers_before(call.sizes.keys, call, at)


@triton.jit
def end_of_keys(call, at, first_i, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the keys of BLOCK_M queries end; where rows without any key average over all of them, behind the last."""
    if OPTIONS.uniform_rows:
        return at.extent
    elif OPTIONS.causal and call.marks.positions is None:
        return tl.minimum(at.keys, tl.maximum(first_i + BLOCK_M + at.shift, 0))
    else:
        return at.keys


@triton.jit
def query_lines(call, at, first_i, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the BLOCK_M queries from row first_i on all that is no vector."""
    row = first_i + tl.arange(0, BLOCK_M)
    before = numbers_before(call.sizes.queries, call, at)
    inside = row < at.queries
    there = inside
    number = row
    position = row
    top = first_i + BLOCK_M - 1
    bottom = first_i
    if call.marks.positions is not None:
        number = tl.load(call.marks.numbers + before + row, mask=inside, other=0)
        position = tl.load(call.marks.positions + before + row, mask=inside, other=-1)
        there = inside & (position >= 0)
        top = tl.max(tl.where(there, position, 0), 0)
        bottom = tl.minimum(tl.min(tl.where(there, position, 2**30), 0), top)
        # Lines without a position compute something, of which nothing is used.
        position = tl.where(there, position, top)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    if call.marks.query_rank is not None:
        rank = tl.load(call.marks.query_rank + before + row, mask=inside, other=0)
    highest = tl.max(tl.where(there, rank, -UNSEEN_RANK), 0)
    lowest = tl.min(rank, 0)
    mask_row = number
    if OPTIONS.mask_by_position:
        mask_row = position
    return Lines(first_i, number, position, there, top, bottom, rank, highest, lowest, mask_row)


@triton.jit
def load_vector(base, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row h of `[H, D]` in float32, zeros where there is no such tensor."""
    d = tl.arange(0, BLOCK_D)
    if base is not None:
        return tl.load(base + h * D + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        return tl.zeros((BLOCK_D,), tl.float32)


@triton.jit
def load_queries(call, at, lines, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """The vectors of the queries of `lines`."""
    x = load_rows(call.query, at, lines.first, at.queries, BLOCK_M, D, BLOCK_D)
    wide = tl.where(lines.there[:, None], x, 0.0).to(tl.float32)
    content = (wide + load_vector(call.biases.content, at.h, D, BLOCK_D)[None, :]).to(x.dtype)
    position = (wide + load_vector(call.biases.position, at.h, D, BLOCK_D)[None, :]).to(x.dtype)
    same = tl.zeros((BLOCK_M,), tl.float32)
    other = tl.zeros((BLOCK_M,), tl.float32)
    segment = tl.zeros((BLOCK_M,), tl.int32)
    if call.marks.query_segments is not None:
        asks = wide + load_vector(call.biases.segment, at.h, D, BLOCK_D)[None, :]
        same = tl.sum(asks * load_vector(call.biases.embedding, at.h, D, BLOCK_D)[None, :], 1)
        other = tl.sum(asks * load_vector(call.biases.embedding, call.sizes.heads + at.h, D, BLOCK_D)[None, :], 1)
        row = lines.first + tl.arange(0, BLOCK_M)
        place = call.marks.query_segments + numbers_before(call.sizes.queries, call, at) + row
        segment = tl.load(place, mask=row < at.queries, other=0)
    return Queries(content, position, same, other, segment)


@triton.jit
def is_other_segment(call, at, queries, j):
    """Of a tile, whether query and key are of different segments; j is `[1, N]` or `[M, N]`."""
    place = call.marks.key_segments + numbers_before(call.sizes.keys, call, at) + j
    return queries.segment[:, None] != tl.load(place, mask=(j >= 0) & (j < at.extent), other=0)


@triton.jit
def allowed_of(call, at, lines, j, OPTIONS: tl.constexpr):
    """Which elements of a tile may be attended; j is `[1, N]` or `[M, N]`."""
    i = lines.number[:, None]
    there = lines.there[:, None]
    real = (j >= 0) & (j < at.extent)
    allowed = real & (j < at.keys)
    if OPTIONS.causal:
        allowed = allowed & (j <= i + at.shift)
    if call.mask.tensor is not None:
        place = call.mask.tensor + (at.b * call.mask.batch + at.h * call.mask.head)
        place += lines.mask_row[:, None].to(tl.int64) * call.mask.row + j.to(tl.int64) * call.mask.column
        allowed = allowed & (tl.load(place, mask=real & there, other=0) != 0)
    if call.marks.key_rank is not None:
        place = call.marks.key_rank + numbers_before(call.sizes.keys, call, at) + j
        order = tl.load(place, mask=real, other=UNSEEN_RANK)
        allowed = allowed & (lines.rank[:, None] > order)
        if OPTIONS.see_self:
            allowed = allowed | ((j == i + at.shift) & (order != UNSEEN_RANK) & real & (j < at.keys))
    elif OPTIONS.see_self:
        allowed = allowed | ((j == i + at.shift) & real & (j < at.keys))
    return allowed & there


@triton.jit
def is_whole(call, at, lines, first_j, j, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether all of a tile may be attended, ranks and mask apart: its queries and keys are there, before the diagonal.

    j is `[1, N]`, or `[M, N]` where the keys move on by one with every query.  Of queries at places of their own
    nothing is whole, nor with segments, beside whose terms a branch takes registers that are not there.
    """
    if (call.marks.positions is not None) or (call.marks.key_segments is not None):
        return False
    else:
        beyond = first_j + BLOCK_N
        if j.shape[0] != 1:
            beyond += BLOCK_M - 1
        whole = (first_j >= 0) & (beyond <= at.keys) & (lines.first + BLOCK_M <= at.queries)
        if OPTIONS.causal:
            whole = whole & (first_j + BLOCK_N - 1 <= lines.first + at.shift)
        return whole


@triton.jit
def classes(
    call, at, lines, first_j, j, settled, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Of a tile with ranks or a mask whether it adds anything, or is left out, and whether nothing of it is masked.

    See `allowed_of`.  With `uniform_rows` a tile of which nothing is seen counts for rows that have seen nothing
    elsewhere, those not `settled`.
    """
    if call.mask.tensor is None and j.shape[0] == 1:
        # By the ranks of the keys alone, without the tile.
        place = call.marks.key_rank + numbers_before(call.sizes.keys, call, at) + j
        order = tl.load(place, mask=(j >= 0) & (j < at.keys), other=UNSEEN_RANK)
        seen = lines.highest > tl.min(tl.min(order, 1), 0)
        whole = is_whole(call, at, lines, first_j, j, OPTIONS, BLOCK_M, BLOCK_N)
        if (call.marks.positions is None) and (call.marks.key_segments is None):
            whole = whole & (lines.lowest > tl.max(tl.max(order, 1), 0))
        if OPTIONS.see_self:
            first = lines.first + at.shift
            seen = seen | ((first + BLOCK_M > first_j) & (first < first_j + BLOCK_N))
    else:
        pairs = count(allowed_of(call, at, lines, j, OPTIONS))
        seen = pairs > 0
        whole = False
        if call.marks.key_segments is None:
            whole = pairs == BLOCK_M * BLOCK_N
    if OPTIONS.uniform_rows:
        seen = seen | some(lines.there[:, None] & (settled == 0)[:, None])
    return seen, whole


@triton.jit
def mask_scores(call, at, s, queries, lines, j, whole, OPTIONS: tl.constexpr):
    """Scores of content and position with the term of segments, scaled; masked ones -inf: see `allowed_of`.

    Of a tile that is `whole` none is masked.
    """
    if call.marks.key_segments is not None:
        other = is_other_segment(call, at, queries, j)
        s += tl.where(other, queries.other[:, None], queries.same[:, None])
    s *= call.scale
    if not whole:
        allowed = allowed_of(call, at, lines, j, OPTIONS)
        if OPTIONS.uniform_rows:
            s = tl.where(allowed, s, UNIFORM_SCORE)
            s = tl.where((j >= 0) & (j < at.extent) & lines.there[:, None], s, -INFINITY)
        else:
            s = tl.where(allowed, s, -INFINITY)
    return s


@triton.jit
def tile_scores(
    call, at, s, x, y, queries, lines, j, whole,
    OPTIONS: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr = 4,
):  # fmt: skip
    """The scores of a tile, one term of which is s already and the other lines of x times rows of y."""
    s = row_products(x, y, s, PRECISION, PIECES)
    return mask_scores(call, at, s, queries, lines, j, whole, OPTIONS)
