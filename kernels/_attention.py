"""What the attention kernels share: records of arguments, a program's place, tiles of rows, the steps of the softmax.

i numbers queries, j keys, both within their sequence; a tile has them as `[BLOCK_M, 1]` and `[1, BLOCK_N]`, or the
other way round where it is transposed.

Scores are rounded before the largest, or lse, is subtracted: where one key outweighs all others, lse is its score to
the last bit, and its weight in backward exactly 1, however large the scores are.  A base of 2 from the start or a
multiplication fused with the subtraction would lose that, so kernels of scores are compiled without fused
multiply-add (products of tiles are not touched by it).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.attention import score_strides, strides
from pyxlbert.launch.rows import int32

from ._philox import keep

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# From here on lse is too coarse for exp(s - lse): see `lse_correction` of `Saved`.
INEXACT_LSE = tl.constexpr(64.0)

# `pyxlbert.reference.relative_attention`: a key of this rank is seen by no row; the score of what is masked where a row
# without any key averages over all of them.
UNSEEN_RANK = tl.constexpr(2**31 - 1)
UNIFORM_SCORE = tl.constexpr(-1e30)

# A tile has at most 128 rows.
PADDED_ROWS = 128
PADDED = tl.constexpr(PADDED_ROWS)
FAR = 2**31 // 128


# What kernels take.  A kernel compiles anew for a field that is None, 1 or a multiple of 16, as for any argument: of
# strides of rows that is wanted, for wide loads, but sizes would make a dozen kernels of a few ragged batches.  Whole
# arguments can be excepted from it, fields of records cannot; so a size is handed over as a number that is neither.


def coded(size: int) -> int:
    """What stands for a size in a record: odd, and above 1."""
    return 2 * size + 3


def decoded(code: int) -> int:
    """The size that `coded` was given."""
    return (code >> 1) - 1


class Rows(NamedTuple):
    """`[B, T, H, D]`, or packed `[total, H, D]`, as an address with strides over sequence, row and head."""

    tensor: Tensor
    batch: int
    row: int
    head: int


class Broadcast(NamedTuple):
    """A mask or bias as an address with strides over B, H, Tq and Tk, 0 along what is broadcast; or None and zeros."""

    tensor: Tensor | None
    batch: int
    head: int
    row: int
    column: int


class Sizes(NamedTuple):
    """Sequences and heads: their number, and where each sequence begins and ends.

    Attributes:
        heads: H.
        queries, keys: Tq and Tk, `coded`; of packed sequences the most that one may have.
        total: rows of packed sequences, `coded`.
        unit: 16 beside a mask or bias whose columns it divides, which are then loaded several at once; or None.
        key_lengths: int32 `[B]` or None.
        cu_seqlens: int32 `[B + 1]`, where packed sequences begin and end, or None.
    """

    heads: int
    queries: int
    keys: int
    total: int
    unit: int | None
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None


class Statistics(NamedTuple):
    """float32 `[B, H, Tq]`, or packed `[H, total]`, as an address with strides over sequence and head, `coded`."""

    tensor: Tensor
    batch: int
    head: int


class Saved(NamedTuple):
    """What backward knows of every row, with strides over sequence and head.

    Every sequence has rows of its own up to a multiple of PADDED, those behind its end as of rows that see nothing, so
    that a tile's are loaded at once and without a look at where the sequence ends.

    Attributes:
        lse: logarithm of the sum of the weights; infinite for a row that sees nothing.
        delta: the sum of dout * out.
        lse_correction: how far lse is off.  exp(s - lse) has the rounding of lse in it, which grows with |lse| and at
            the end swallows the number of keys (a row whose scores are finfo.min throughout), or is larger than any
            exponent (scores of 1e10 and more): of such rows the logarithm of the sum is taken again, from the largest
            score as backward finds it, and its difference from lse is what is left to subtract.
    """

    lse: Tensor
    delta: Tensor
    lse_correction: Tensor
    batch: int
    head: int


def rows_of(x: Tensor) -> Rows:
    """x in place where its last dimension is contiguous, else a copy; a packed tensor's batch stride is 0.

    Within a tile rows are counted in 32 bits: those too far apart are copied too.
    """
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or (x.shape[-3] > 1 and x.stride(-3) >= FAR):
        x = x.contiguous()
    return Rows(x, *strides(x))


def sizes_of(call: Any, query: Tensor, columns: int | None) -> tuple[int, Sizes]:
    """The number of sequences, and the sizes of a call, or of one of its streams with queries of its own.

    `columns` are those of a mask or bias, or None.
    """
    heads, lengths, offsets = query.shape[-2], int32(call.key_lengths), int32(call.cu_seqlens)
    if offsets is None:
        unit = None if columns is None or columns % 16 != 0 else 16
        size = Sizes(heads, coded(query.shape[1]), coded(call.key.shape[1]), coded(0), unit, lengths, None)
        return query.shape[0], size
    most = coded(call.max_seqlen)
    return offsets.shape[0] - 1, Sizes(heads, most, most, coded(query.shape[0]), None, lengths, offsets)


def statistics_of(lse: Tensor) -> Statistics:
    """Of `[B, H, Tq]` or packed `[H, total]`, contiguous."""
    return Statistics(lse, *map(coded, lse.stride()[:2] if lse.dim() == 3 else (0, lse.stride(0))))


def saved_of(lse: Tensor, sizes: Sizes) -> Saved:
    """Room for what backward wants to know of every row, given lse `[B, H, Tq]`, or packed `[H, total]`."""
    rows = padded(lse.shape[-1])
    if sizes.cu_seqlens is not None:
        rows += sizes.cu_seqlens.shape[0] * PADDED_ROWS
    size = (*lse.shape[:-1], rows)
    parts = (torch.empty(size, dtype=torch.float32, device=lse.device) for _ in range(3))
    return Saved(*parts, *((lse.shape[1] * rows, rows) if lse.dim() == 3 else (0, rows)))


def padded(rows: int) -> int:
    """How many rows backward saves something of, of so many."""
    return triton.cdiv(rows, PADDED_ROWS) * PADDED_ROWS


def broadcast_of(x: Tensor | None) -> Broadcast:
    """Of a tensor that broadcasts to `[B, H, Tq, Tk]`, or None; a boolean one as bytes."""
    return Broadcast(x.view(torch.uint8) if x is not None and x.dtype is torch.bool else x, *score_strides(x))


def constants_of(head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel of scores is compiled for."""
    padded = max(16, triton.next_power_of_2(head_size))
    return {"PRECISION": precision_of(dtype), "D": head_size, "BLOCK_D": padded}


def precision_of(dtype: torch.dtype) -> str:
    """How products of float32 tiles are computed: as float32, unless torch may round to tf32."""
    return "tf32" if dtype is torch.float32 and _may_round() else "ieee"


def _may_round() -> bool:
    matmul = torch.backends.cuda.matmul
    # Once the newer name was set the older one raises; the newer one knows what either was set to.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def grid_of(rows: int, block: int, planes: int) -> tuple[int]:
    """The grid of kernels that begin with `block_and_plane`."""
    return (triton.cdiv(rows, block) * planes,)


def typed(record, _semantic=None):
    """A record of records, at the beginning of a kernel, before anything is done with it.

    Triton knows the type of such an argument from before it has filled in what is constant, a None or a 1, and in a
    loop a value is what its type says: a stride of 1 would be None there.  Here the type is made from the values.
    """
    if not isinstance(record, tl.tuple):
        return record
    values = [typed(x) for x in record.values]
    return tl.tuple(values, tl.tuple_type([x.type for x in values], record.type.fields))


# It runs while a kernel is compiled, and in the interpreter as it is; some versions pass on what they call semantic.
setattr(typed, tl.core.TRITON_BUILTIN, True)


@triton.jit
def number(code):
    """`decoded`, in a kernel."""
    return (code >> 1) - 1


@triton.jit
def block_and_plane(rows, BLOCK: tl.constexpr):
    """Which block of so many rows, and which plane (a sequence's head), this program is for.

    Programs are on the grid's first axis, which takes 2^31 - 1 where the others end at 65,535; those of one plane
    follow each other, so that they find its keys in the cache.
    """
    blocks = tl.cdiv(rows, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


class Plane(NamedTuple):
    """A sequence's head, as a program sees it: what `opened` returns.

    Attributes:
        number: among all B * H, which dropout's bits depend on.
        b, h: sequence and head.
        start: the row of packed tensors that the sequence begins with, else 0.
        saved: where the rows of `Saved` begin, which are in front of those of a packed sequence by up to PADDED a
            sequence, else 0.
        queries, keys: how many the sequence has; keys without those past its length.
        extent: its keys with those past its length.
        shift: query i stands beside key i + shift.
        wrong: whether the numbers that say all this are out of range.
    """

    number: Any
    b: Any
    h: Any
    start: Any
    saved: Any
    queries: Any
    keys: Any
    extent: Any
    shift: Any
    wrong: Any


@triton.jit
def opened(sizes, plane):
    """The plane of this number; numbers out of range are brought into it, so that nothing outside is read."""
    b = (plane // sizes.heads).to(tl.int64)
    h = (plane % sizes.heads).to(tl.int64)
    start = 0
    saved = 0
    queries = number(sizes.queries)
    keys = number(sizes.keys)
    if sizes.unit is not None:
        # The same number, of which Triton now knows that 16 divides it.
        keys = keys // 16 * sizes.unit
    shift = keys - queries
    extent = keys
    wrong = False
    if sizes.cu_seqlens is not None:
        first = tl.load(sizes.cu_seqlens + b)
        last = tl.load(sizes.cu_seqlens + b + 1)
        total = number(sizes.total)
        most = queries
        start = tl.minimum(tl.maximum(first, 0), total)
        queries = tl.minimum(tl.maximum(last, start), total) - start
        saved = (start + b * PADDED) // PADDED * PADDED
        keys = queries
        wrong = (first < 0) | (last < first) | (last > total) | (queries > most)
    if sizes.key_lengths is not None:
        length = tl.load(sizes.key_lengths + b)
        wrong = (length < 0) | (length > keys)
        keys = tl.minimum(tl.maximum(length, 0), keys)
    if sizes.cu_seqlens is not None:
        extent = keys
    return Plane(plane, b, h, tl.cast(start, tl.int64), tl.cast(saved, tl.int64), queries, keys, extent, shift, wrong)


@triton.jit
def first_row(rows, at):
    """The address of a plane's first row."""
    return rows.tensor + (at.b * rows.batch + at.start * rows.row + at.h * rows.head)


@triton.jit
def first_statistic(statistics, at):
    """How far from the beginning a plane's first statistic lies."""
    return at.b * number(statistics.batch) + at.h * number(statistics.head) + at.start


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def load_rows(rows, at, first, count, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first .. first + BLOCK - 1 of a plane, of which there are `count`: `[BLOCK, BLOCK_D]`, zeros outside."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (first + n < count)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    place = first_row(rows, at) + tl.cast(first, tl.int64) * rows.row
    return tl.load(place + (n[:, None] * rows.row + d[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(rows, at, x, first, count, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `load_rows`; x is rounded to what the rows are."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (first + n < count)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    place = first_row(rows, at) + tl.cast(first, tl.int64) * rows.row
    tl.store(place + (n[:, None] * rows.row + d[None, :]), x.to(rows.tensor.dtype.element_ty), mask=inside)


@triton.jit
def load_douts(
    dout, at, first_i, lse, EMPTY: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`load_rows` of dout; a row that sees nothing takes none, which may be anything there.

    Without EMPTY there is no such row, and what was loaded goes to the products as it is.
    """
    x = load_rows(dout, at, first_i, at.queries, BLOCK_M, D, BLOCK_D)
    if EMPTY:
        x = tl.where((lse != INFINITY)[:, None], x, 0.0).to(x.dtype)
    return x


@triton.jit
def first_saved(saved, at):
    """How far from the beginning what is saved of a plane's first row lies."""
    return at.b * saved.batch + at.h * saved.head + at.saved


@triton.jit
def load_lse(saved, at, row):
    """Of rows `[M]` of a plane; those outside see nothing."""
    return tl.load(saved.lse + (first_saved(saved, at) + row))


@triton.jit
def load_delta(saved, at, row):
    """Of rows `[M]` of a plane: delta, and the correction of lse."""
    place = first_saved(saved, at) + row
    return tl.load(saved.delta + place), tl.load(saved.lse_correction + place)


@triton.jit
def delta_of(dout, out, at, first_i, lse, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of dout * out of BLOCK_M rows."""
    gradient = load_rows(dout, at, first_i, at.queries, BLOCK_M, D, BLOCK_D).to(tl.float32)
    result = load_rows(out, at, first_i, at.queries, BLOCK_M, D, BLOCK_D).to(tl.float32)
    return tl.sum(tl.where((lse != INFINITY)[:, None], gradient * result, 0.0), 1)


@triton.jit
def is_inexact(lse):
    """Of which rows the weights are summed again."""
    return (lse != INFINITY) & (tl.abs(lse) >= INEXACT_LSE)


@triton.jit
def saved_rows(sizes):
    """How many rows of each plane have something saved, those behind its last query too."""
    return tl.cdiv(number(sizes.queries), PADDED) * PADDED


@triton.jit
def store_saved(saved, at, row, delta, lse, inexact, weight, top):
    """lse and delta of rows `[M]`, and from the running softmax of those that are `inexact` the correction of lse."""
    place = first_saved(saved, at) + row
    tl.store(saved.lse + place, lse)
    tl.store(saved.delta + place, delta)
    tl.store(
        saved.lse_correction + place,
        tl.where(inexact, (top - lse) + tl.log2(tl.where(inexact, weight, 1.0)) * LN2, 0.0),
    )


@triton.jit
def load_scores(x, at, i, j, EDGE: tl.constexpr = True):
    """The tile of a mask or bias at (i, j), zeros outside of the tensor; without EDGE all its keys are there."""
    place = x.tensor + (at.b * x.batch + at.h * x.head)
    place += i.to(tl.int64) * x.row + j.to(tl.int64) * x.column
    inside = i < at.queries
    if EDGE:
        inside = inside & (j < at.extent)
    return tl.load(place, mask=inside, other=0)


@triton.jit
def count(tile):
    """How many elements of a tile `[M, N]` of booleans are true: of none nothing is computed, and where all are no
    element is asked.
    """
    return tl.sum(tl.sum(tile.to(tl.int32), 1), 0)


@triton.jit
def some(tile):
    """Whether any element of a tile `[M, N]` of booleans is true."""
    return tl.max(tl.max(tile.to(tl.int32), 1), 0) != 0


@triton.jit
def kept(dropout, i, first_j, at, TAG: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of the tile of queries i `[M, 1]` and BLOCK_N keys survive dropout, `[M, BLOCK_N]`."""
    block = first_j // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    return keep(tl.load(dropout.seed), block, i, at.number, TAG, dropout.threshold)


@triton.jit
def weights_of(s, lse, lse_correction):
    """The weights of scores, given what is known of their rows, broadcast to the tile.

    None is above 1, even where another order of adding left a score of 1e10 a rounding above the largest; NaN stays.
    """
    return exp(tl.minimum((s - lse) - lse_correction, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def softmax_step(s, weight, top):
    """The running softmax over one more tile of scores `[M, N]`, given the sum of weights and the largest so far.

    Returns:
        the tile's weights, what all before it are to be multiplied by, and the sum and the largest now.
    """
    above = tl.maximum(top, tl.max(s, 1))
    # A row that has seen nothing yet stays at -inf, from which nothing may be subtracted.
    level = tl.where(above == -INFINITY, 0.0, above)
    p = exp(s - level[:, None])
    less = exp(top - level)
    return p, less, weight * less + tl.sum(p, 1), above


@triton.jit
def softmax_end(acc, weight, top, factor):
    """The rows' results `[M, BLOCK_D]`, times a factor, and their lse `[M]`."""
    some_key = weight > 0
    result = tl.where(some_key[:, None], acc * (factor / tl.where(some_key, weight, 1.0))[:, None], 0.0)
    lse = tl.where(some_key, top + tl.log2(tl.where(some_key, weight, 1.0)) * LN2, INFINITY)
    # A NaN among the scores is one in the weights.
    result = tl.where((weight != weight)[:, None], weight[:, None], result)
    return result, tl.where(weight != weight, weight, lse)


@triton.jit
def store_results(
    out, statistics, at, first_i, acc, weight, top, factor, sizes,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The end of the running softmax, stored; of a sequence whose numbers are out of range NaN."""
    result, lse = softmax_end(acc, weight, top, factor)
    if (sizes.key_lengths is not None) or (sizes.cu_seqlens is not None):
        result = tl.where(at.wrong, float("nan"), result)
    store_rows(out, at, result, first_i, at.queries, BLOCK_M, D, BLOCK_D)
    row = first_i + tl.arange(0, BLOCK_M)
    tl.store(statistics.tensor + (first_statistic(statistics, at) + row), lse, mask=row < at.queries)
