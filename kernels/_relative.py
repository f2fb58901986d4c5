"""The kernels of relative_attention and two_stream_attention, forward and backward, for one stream of queries.

A tile of BLOCK_M queries and BLOCK_N keys meets a band of the position table.  Query i, at position p_i, meets key j at
row c + j - p_i, so that in the product of the queries with the band's rows every line has to be moved, by another
number of columns each:

    table rows   first .. first + BLOCK_N - 1     first + BLOCK_N ..
                 +------------------------+------------------------+
    query m      |      . x x x x x x x x | x x x . . . . . . . .  |   x: the BLOCK_N elements that line m needs,
    query m + 1  |    . x x x x x x x x x | x x . . . . . . . . .  |      from column shift_m on
                 +------------------------+------------------------+

Neighbouring queries need at most two blocks of columns, and of every column of the two just one element per line:
they are mixed first, and the skew is then a rotation, `rotated`.  It is a gather on the tile laid out flat in shared
memory, in an order of bits that keeps lanes in different banks (`swizzled`, `place`); a gather along one axis would go
through shuffles, four times slower and with spills.  Queries that stand anywhere (`query_positions`) are sorted by
position first, and take as many blocks of the band as their positions spread over.

A program that walks the keys may carry the products with the upper block on (CARRY, a choice of the table of tiles, as
they take registers): they are the next tile's with its lower one, and the position term then costs one product a tile,
as the content term does.  Tiles that ranks or a mask empty are left
out, after a look at the ranks or the mask; then the next tile begins anew.

The gradient of the table has a program per block of its rows, which walks all queries: there the scores are laid out by
table row, and keys and values are what is skewed.  Nothing is added up by two programs, unless
`pyxlbert.allow_atomics` lets the kernel of dquery add to the table's gradient on its way.

Source: Dai et al., "Transformer-XL", https://arxiv.org/abs/1901.02860, appendix B (`rel_shift`); Yang et al., "XLNet",
https://arxiv.org/abs/1906.08237, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert import backends
from pyxlbert.launch.relative import Shared
from pyxlbert.launch.relative import Stream as Queries
from pyxlbert.launch.rows import int32

from ._configurations import COMPILE_OPTIONS, configuration
from ._launch import launch
from ._philox import dropout_numbers, keep, keep_each
from ._products import add_product, row_products, row_products_of_two
from ._scores import (
    INFINITY,
    LN2,
    block_and_plane,
    broadcast_of,
    exp,
    grid_of,
    load_rows,
    precision_of,
    rows_of,
    sequence,
    some,
    store_rows,
    strides_of_statistics,
)

# `pyxlbert.reference.relative_attention`: a key of this rank is seen by no row; the score of what is masked where a row
# without any key averages over all of them.
UNSEEN_RANK = tl.constexpr(2**31 - 1)
UNIFORM_SCORE = tl.constexpr(-1e30)


class Stream:
    """The queries of one stream as the kernels take them, sorted by position if they have any."""

    def __init__(self, shared: Shared, stream: Queries) -> None:
        query, self.shared, self.tag = stream.query, shared, stream.tag
        self.see_self, self.mask_by_position = stream.see_self, stream.mask_by_position
        self.order: Tensor | None = None
        positions, segments, rank = int32(stream.positions), int32(stream.segments), int32(stream.rank)
        if positions is not None:
            self.order = positions.argsort(dim=1, stable=True)
            positions, segments, rank = (
                None if x is None else x.gather(1, self.order) for x in (positions, segments, rank)
            )
        self.numbers = int32(self.order)
        self.positions, self.segments, self.rank = positions, segments, rank
        self.query = self.sorted(query)
        self.heads, self.head_size = query.shape[-2:]
        table = shared.table.to(query.dtype)
        tables = table.shape[0] if table.dim() == 4 else 1
        if shared.cu_seqlens is None:
            batch, self.queries, self.keys, total = query.shape[0], query.shape[1], shared.key.shape[1], 0
        else:
            batch, self.queries, self.keys = shared.cu_seqlens.shape[0] - 1, shared.max_seqlen, shared.max_seqlen
            total = query.shape[0]
        self.batch, self.total = batch, total
        self.planes, self.tables, self.table_rows = batch * self.heads, tables, table.shape[-3]
        table_rows = rows_of(table)
        mask = broadcast_of(shared.attention_mask)
        seed = None if shared.dropout_p == 0.0 else shared.seed
        self.extras = mask.tensor is not None or seed is not None or rank is not None
        self._arguments = (
            *(*rows_of(self.query), *rows_of(shared.key), *rows_of(shared.value)),
            *(*table_rows, self.table_rows, shared.offset, max(1, batch // tables)),
            *(None if x is None else x.contiguous() for x in shared.biases),
            *(segments, int32(shared.key_segments), positions, self.numbers),
            *(int32(shared.key_lengths), int32(shared.cu_seqlens), rank, int32(shared.key_rank)),
            *(mask.tensor, *mask.strides),
            *(self.heads, self.queries, self.keys, total, shared.scale),
            *(seed, *dropout_numbers(shared.dropout_p)),
        )

    def sorted(self, x: Tensor) -> Tensor:
        """Rows `[B, T, H, D]` in the order of their positions."""
        return x if self.order is None else x.take_along_dim(self.order[:, :, None, None], 1)

    def unsorted(self, x: Tensor) -> Tensor:
        """The way back."""
        if self.order is None:
            return x
        return torch.empty_like(x).scatter_(1, self.order[:, :, None, None].expand_as(x), x)

    def options(self, kernel: str) -> dict[str, Any]:
        """Compile-time constants, the tile, how it is compiled."""
        tile = configuration(kernel if self.order is None else f"{kernel}_positions", self.query, self.extras)
        return {
            "CAUSAL": self.shared.causal,
            "SEE_SELF": self.see_self,
            "UNIFORM": self.shared.uniform_rows,
            "BY_POSITION": self.mask_by_position,
            "TAG": self.tag,
            "PRECISION": precision_of(self.query.dtype),
            "D": self.head_size,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_size)),
            **COMPILE_OPTIONS,
            **tile.constants(),
        }

    def forward(self) -> tuple[Tensor, Tensor]:
        """out like query and lse `[B, H, T]`, packed `[H, total]`."""
        out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        *first, rows, heads, _ = self.query.shape
        lse = torch.empty((*first, heads, rows), dtype=torch.float32, device=out.device)
        if lse.numel() == 0:
            return out, lse
        options = self.options("relative_fwd")
        launch(
            _fwd,
            grid_of(self.queries, options["BLOCK_M"], self.planes),
            out.device,
            *(*self._arguments, *rows_of(out), lse, *strides_of_statistics(lse)),
            **options,
        )
        return self.unsorted(out), self._statistics(lse, back=True)

    def _statistics(self, lse: Tensor, back: bool = False) -> Tensor:
        if self.order is None:
            return lse.contiguous()
        order = self.order[:, None].expand_as(lse)
        return torch.empty_like(lse).scatter_(2, order, lse) if back else lse.gather(2, order)

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Gradients by name; those of key and value in `dtype` or their own, of table and biases in float32."""
        shared, device = self.shared, self.query.device
        dquery = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        dkey, dvalue = (
            torch.empty_like(x, dtype=dtype or x.dtype, memory_format=torch.contiguous_format)
            for x in (shared.key, shared.value)
        )
        table_shape = (self.tables, self.table_rows, self.heads, self.head_size)
        dtable = torch.empty(table_shape, dtype=torch.float32, device=device)
        if lse.numel() == 0 or shared.key.numel() == 0:
            parts = torch.zeros(self.heads, 5, self.head_size, device=device)
            found = {"query": dquery, "key": dkey, "value": dvalue, "table": dtable}
            return {name: x.zero_() for name, x in found.items()} | _biases(parts)
        lse = self._statistics(lse)
        delta, rest = torch.empty_like(lse), torch.empty_like(lse)
        saved = (*self._arguments, *rows_of(self.sorted(dout)), lse, delta, rest, *strides_of_statistics(lse))
        options = self.options("relative_bwd_rows")
        launch(
            _bwd_rows,
            grid_of(self.queries, options["BLOCK_M"], self.planes),
            device,
            *(*saved, *rows_of(self.sorted(out))),
            **options,
        )
        options = self.options("relative_bwd_keys")
        launch(
            _bwd_keys,
            grid_of(self.keys, options["BLOCK_N"], self.planes),
            device,
            *(*saved, *rows_of(dkey), *rows_of(dvalue)),
            **options,
        )
        # With its gradient added up by atomics the table needs no kernel of its own, which repeats five products.  For
        # that much at once long rows of float32 would not fit a thread's registers.
        atomic = backends.atomics_allowed() and (self.query.element_size() == 2 or self.head_size <= 64)
        options = self.options("relative_bwd_queries_table" if atomic else "relative_bwd_queries")
        blocks = triton.cdiv(self.queries, options["BLOCK_M"])
        parts = torch.empty(self.planes, blocks, 5, self.head_size, dtype=torch.float32, device=device)
        added = dtable.zero_() if atomic else None
        launch(_bwd_queries, (blocks * self.planes,), device, *(*saved, *rows_of(dquery), parts, added), **options)
        if not atomic:
            options = self.options("relative_bwd_table")
            launch(
                _bwd_table,
                grid_of(self.table_rows, options["BLOCK_N"], self.tables * self.heads),
                device,
                *(*saved, dtable),
                **options,
            )
        sums = parts.view(-1, self.heads, blocks, 5, self.head_size).sum((0, 2))
        found = {"query": self.unsorted(dquery), "key": dkey, "value": dvalue, "table": dtable}
        return found | _biases(sums)


def _biases(sums: Tensor) -> dict[str, Tensor]:
    """`[H, 5, D]`, what `_bwd_queries` adds up of every block of queries, by name."""
    # Each a tensor of its own: what an op returns shares no memory.
    content, position, segment, same, different = (
        x.clone(memory_format=torch.contiguous_format) for x in sums.unbind(1)
    )
    return {
        "content": content,
        "position": position,
        "segment": segment,
        "embedding": torch.stack([same, different]),
    }


@triton.jit
def place(m, c, W: tl.constexpr):
    """Where `swizzled` puts element (m, c) of `[M, W]`."""
    return (m // 8) * (8 * W) + (c // 8) * 64 + (c & 1) * 32 + ((c // 2) & 3) * 8 + (m & 7)


@triton.jit
def swizzled(x, M: tl.constexpr, W: tl.constexpr):
    """`[M, W]` laid out flat, its bits in the order (m / 8, c / 8, c % 2, c / 2 % 4, m % 8).

    The eight lines and four pairs of columns of a matrix instruction's result then lie in 32 different banks.
    """
    x = tl.permute(tl.reshape(x, (M // 8, 8, W // 8, 4, 2)), (0, 2, 4, 3, 1))
    return tl.reshape(x, (M * W,))


@triton.jit
def rotated(x, shift, M: tl.constexpr, W: tl.constexpr):
    """y[m, n] = x[m, (n + shift_m) mod W], with W a power of two."""
    m = tl.arange(0, M)[:, None]
    c = (tl.arange(0, W)[None, :] + shift[:, None]) & (W - 1)
    return tl.reshape(tl.gather(swizzled(x, M, W), tl.reshape(place(m, c, W), (M * W,)), 0), (M, W))


@triton.jit
def load_seen(base, first, count, stride, rank, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Like `load_rows`, and `first` may be negative; of keys that no row may see, by their rank, nothing is read."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    seen = (first + n >= 0) & (first + n < count)
    if rank is not None:
        seen = seen & (tl.load(rank + first + n, mask=seen, other=UNSEEN_RANK) != UNSEEN_RANK)
    inside = seen[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    at = base + tl.cast(first, tl.int64) * stride
    return tl.load(at + (n[:, None] * stride + d[None, :]), mask=inside, other=0.0)


@triton.jit
def products(
    x,
    base,
    first,
    count,
    stride,
    rank,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`[BLOCK_M, BLOCK_N]`: every line of x times rows first .. first + BLOCK_N - 1 of a matrix."""
    rows = load_seen(base, first, count, stride, rank, BLOCK_N, D, BLOCK_D)
    return row_products(x, rows, None, PRECISION)


@triton.jit
def skewed(
    x,
    base,
    first,
    count,
    stride,
    rank,
    shift,
    spread,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`[BLOCK_M, BLOCK_N]`: line m of x times row first + n + shift_m of a matrix, 0 <= shift <= spread.

    With TWO, spread <= BLOCK_N.
    """
    n = tl.arange(0, BLOCK_N)[None, :]
    if TWO:
        low = load_seen(base, first, count, stride, rank, BLOCK_N, D, BLOCK_D)
        high = load_seen(base, first + BLOCK_N, count, stride, rank, BLOCK_N, D, BLOCK_D)
        left, right = row_products_of_two(x, low, high, PRECISION)
        return rotated(tl.where(n >= shift[:, None], left, right), shift, BLOCK_M, BLOCK_N)
    else:
        tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        m = tl.arange(0, BLOCK_M)[:, None]
        for start in range(0, spread + BLOCK_N, BLOCK_N):
            block = load_seen(base, first + start, count, stride, rank, BLOCK_N, D, BLOCK_D)
            band = swizzled(row_products(x, block, None, PRECISION), BLOCK_M, BLOCK_N)
            c = n + shift[:, None] - start
            inside = (c >= 0) & (c < BLOCK_N)
            at = tl.reshape(place(m, tl.where(inside, c, 0), BLOCK_N), (BLOCK_M * BLOCK_N,))
            tile = tl.where(inside, tl.reshape(tl.gather(band, at, 0), (BLOCK_M, BLOCK_N)), tile)
        return tile


@triton.jit
def rolled(
    x,
    band,
    base,
    first,
    count,
    stride,
    shift,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`skewed` for one tile after another: `band` is the products with the lower block, and those with the upper one
    are returned beside the tile, since they are what the next tile begins with.  Saves one of three products.
    """
    upper = products(x, base, first + BLOCK_N, count, stride, None, PRECISION, D, BLOCK_D, BLOCK_N)
    n = tl.arange(0, BLOCK_N)[None, :]
    return rotated(tl.where(n >= shift[:, None], band, upper), shift, BLOCK_M, BLOCK_N), upper


@triton.jit
def lines(first_i, at, queries, positions, numbers, BLOCK_M: tl.constexpr):
    """Of BLOCK_M queries: number, position, whether they are there, the largest and the smallest position."""
    row = first_i + tl.arange(0, BLOCK_M)
    there = row < queries
    number = row
    position = row
    top = first_i + BLOCK_M - 1
    bottom = first_i
    if positions is not None:
        number = tl.load(numbers + at + row, mask=there, other=0)
        position = tl.load(positions + at + row, mask=there, other=-1)
        there = there & (position >= 0)
        top = tl.max(tl.where(there, position, 0), 0)
        bottom = tl.minimum(tl.min(tl.where(there, position, 2**30), 0), top)
        # Lines without a position compute something, of which nothing is used.
        position = tl.where(there, position, top)
    return number, position, there, top, bottom


@triton.jit
def load_vector(base, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row h of `[H, D]` in float32, zeros where there is no such tensor."""
    d = tl.arange(0, BLOCK_D)
    if base is not None:
        return tl.load(base + h * D + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        return tl.zeros((BLOCK_D,), tl.float32)


@triton.jit
def allowed_of(
    i,
    j,
    there,
    rank,
    key_rank,
    mask,
    mask_i,
    mask_j,
    mask_row,
    keys,
    extent,
    shift,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
):
    """Which elements of a tile may be attended; i, there, rank are `[M, 1]`, j `[1, N]` or `[M, N]`.

    `keys` may be seen, `extent` are there.  key_rank and mask begin at the sequence.
    """
    real = (j >= 0) & (j < extent)
    allowed = real & (j < keys)
    if CAUSAL:
        allowed = allowed & (j <= i + shift)
    if mask is not None:
        at = mask + (mask_row.to(tl.int64) * mask_i + j.to(tl.int64) * mask_j)
        allowed = allowed & (tl.load(at, mask=real & there, other=0) != 0)
    if key_rank is not None:
        order = tl.load(key_rank + j, mask=real, other=UNSEEN_RANK)
        allowed = allowed & (rank > order)
        if SEE_SELF:
            allowed = allowed | ((j == i + shift) & (order != UNSEEN_RANK) & real & (j < keys))
    elif SEE_SELF:
        allowed = allowed | ((j == i + shift) & real & (j < keys))
    return allowed & there


@triton.jit
def some_seen(
    first_i,
    first_j,
    i,
    j,
    there,
    rank,
    highest,
    key_rank,
    mask,
    mask_i,
    mask_j,
    mask_row,
    keys,
    extent,
    shift,
    settled,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether a tile adds anything, or is left out: see `allowed_of`; `highest` is the largest rank.

    With UNIFORM a tile that nothing is seen of counts for rows that have seen nothing elsewhere, those not `settled`.
    """
    if mask is None and j.shape[0] == 1:
        # By the ranks of the keys alone, without the tile.
        order = tl.load(key_rank + j, mask=(j >= 0) & (j < keys), other=UNSEEN_RANK)
        seen = highest > tl.min(tl.min(order, 1), 0)
        if SEE_SELF:
            seen = seen | ((first_i + BLOCK_M + shift > first_j) & (first_i + shift < first_j + BLOCK_N))
    else:
        seen = some(
            allowed_of(
                i, j, there, rank, key_rank, mask, mask_i, mask_j, mask_row, keys, extent, shift, CAUSAL, SEE_SELF
            )
        )
    if UNIFORM:
        seen = seen | some(there & (settled == 0)[:, None])
    return seen


@triton.jit
def finished(
    s,
    i,
    j,
    there,
    same,
    different,
    segment,
    key_segments,
    rank,
    key_rank,
    mask,
    mask_i,
    mask_j,
    mask_row,
    queries,
    keys,
    extent,
    shift,
    scale,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Scores of content and position with the term of segments, scaled; masked ones -inf: see `allowed_of`.

    same, different and segment are `[M, 1]`; key_segments begins at the sequence.
    """
    real = (j >= 0) & (j < extent)
    if key_segments is not None:
        kind = tl.load(key_segments + j, mask=real, other=0)
        s += tl.where(segment != kind, different, same)
    s *= scale
    allowed = allowed_of(
        i, j, there, rank, key_rank, mask, mask_i, mask_j, mask_row, keys, extent, shift, CAUSAL, SEE_SELF
    )
    if UNIFORM:
        s = tl.where(allowed, s, UNIFORM_SCORE)
        return tl.where(real & there, s, -INFINITY)
    else:
        return tl.where(allowed, s, -INFINITY)


@triton.jit
def prepared(
    query,
    first_i,
    queries,
    query_t,
    there,
    at,
    h,
    heads,
    content_bias,
    position_bias,
    segment_bias,
    segment_embedding,
    query_segments,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of queries: as it is, with the content and with the position bias, its products with the two segment
    embeddings `[M]`, its segments `[M, 1]`.
    """
    q = load_rows(query, first_i, queries, query_t, BLOCK_M, D, BLOCK_D)
    q = tl.where(there[:, None], q, 0.0).to(query.dtype.element_ty)
    wide = q.to(tl.float32)
    content = (wide + load_vector(content_bias, h, D, BLOCK_D)[None, :]).to(q.dtype)
    position = (wide + load_vector(position_bias, h, D, BLOCK_D)[None, :]).to(q.dtype)
    row = first_i + tl.arange(0, BLOCK_M)
    segment = tl.zeros((BLOCK_M, 1), tl.int32)
    same = tl.zeros((BLOCK_M,), tl.float32)
    different = tl.zeros((BLOCK_M,), tl.float32)
    if query_segments is not None:
        asks = wide + load_vector(segment_bias, h, D, BLOCK_D)[None, :]
        same = tl.sum(asks * load_vector(segment_embedding, h, D, BLOCK_D)[None, :], 1)
        different = tl.sum(asks * load_vector(segment_embedding, heads + h, D, BLOCK_D)[None, :], 1)
        segment = tl.load(query_segments + at + row, mask=row < queries, other=0)[:, None]
    return q, content, position, same, different, segment


@triton.jit
def load_ranks(query_rank, at, first_i, queries, there, BLOCK_M: tl.constexpr):
    """Of BLOCK_M queries, `[M, 1]`, and the largest of those that are there."""
    rank = tl.zeros((BLOCK_M, 1), tl.int32)
    if query_rank is not None:
        row = first_i + tl.arange(0, BLOCK_M)
        rank = tl.load(query_rank + at + row, mask=row < queries, other=0)[:, None]
    return rank, tl.max(tl.max(tl.where(there[:, None], rank, -UNSEEN_RANK), 1), 0)


@triton.jit
def _fwd(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    table,
    table_g,
    table_t,
    table_h,
    table_rows,
    offset,
    per_table,
    content_bias,
    position_bias,
    segment_bias,
    segment_embedding,
    query_segments,
    key_segments,
    positions,
    numbers,
    key_lengths,
    cu_seqlens,
    query_rank,
    key_rank,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    out,
    out_b,
    out_t,
    out_h,
    lse,
    lse_b,
    lse_h,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_POSITION: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CARRY: tl.constexpr,
):
    """The running softmax over the keys of BLOCK_M queries."""
    block, plane = block_and_plane(queries, BLOCK_M)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    shift = keys - queries
    extent = keys
    at_i = b * queries
    at_j = b * keys
    start, queries, keys, wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if cu_seqlens is not None:
        extent = keys
        at_i = start
        at_j = start
    TWO: tl.constexpr = positions is None
    ROLLED: tl.constexpr = CARRY and positions is None
    SPARSE: tl.constexpr = (key_rank is not None) or (mask is not None)
    # Where a row without any key averages over all of them, all of them are read.
    readable = keys
    hidden = key_rank
    if key_rank is not None:
        key_rank += at_j
        hidden += at_j
    if UNIFORM:
        readable = extent
        hidden = None
    if key_segments is not None:
        key_segments += at_j
    if mask is not None:
        mask += b * mask_b + h * mask_h
    table += (b // per_table) * table_g + h * table_h
    query += b * query_b + start * query_t + h * query_h
    key += b * key_b + start * key_t + h * key_h
    value += b * value_b + start * value_t + h * value_h
    first_i = block * BLOCK_M
    if first_i < queries:
        number, position, there, top, bottom = lines(first_i, at_i, queries, positions, numbers, BLOCK_M)
        _q, content, place_part, same, different, segment = prepared(
            query, first_i, queries, query_t, there, at_i, h, heads, content_bias, position_bias, segment_bias,
            segment_embedding, query_segments, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        rank, highest = load_ranks(query_rank, at_i, first_i, queries, there, BLOCK_M)
        mask_row = number
        if BY_POSITION:
            mask_row = position
        high = readable
        if CAUSAL and not UNIFORM and TWO:
            high = tl.minimum(keys, tl.maximum(first_i + BLOCK_M + shift, 0))
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        moved = top - position
        if ROLLED:
            # The upper block of a tile's band is the lower one of the next: see `rolled`.
            band = products(place_part, table, offset - top, table_rows, table_t, None, PRECISION, D, BLOCK_D, BLOCK_N)
            band_at = 0
        for first_j in range(0, high, BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)
            live = True
            if SPARSE:
                live = some_seen(
                    first_i, first_j, number[:, None], j[None, :], there[:, None], rank, highest,
                    key_rank, mask, mask_i, mask_j, mask_row[:, None], keys, extent, shift,
                    largest > 0.5 * UNIFORM_SCORE, CAUSAL, SEE_SELF, UNIFORM, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if live:
                k = load_seen(key, first_j, readable, key_t, hidden, BLOCK_N, D, BLOCK_D)
                if ROLLED:
                    if SPARSE and band_at != first_j:
                        band = products(
                            place_part, table, offset + first_j - top, table_rows, table_t, None,
                            PRECISION, D, BLOCK_D, BLOCK_N,
                        )  # fmt: skip
                    s, band = rolled(
                        place_part, band, table, offset + first_j - top, table_rows, table_t, moved,
                        PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    band_at = first_j + BLOCK_N
                else:
                    s = skewed(
                        place_part, table, offset + first_j - top, table_rows, table_t, None, moved, top - bottom,
                        TWO, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                s = row_products(content, k, s, PRECISION)
                s = finished(
                    s, number[:, None], j[None, :], there[:, None], same[:, None], different[:, None],
                    segment, key_segments, rank, key_rank, mask, mask_i, mask_j, mask_row[:, None],
                    queries, keys, extent, shift, scale, CAUSAL, SEE_SELF, UNIFORM,
                )  # fmt: skip
                above = tl.maximum(largest, tl.max(s, 1))
                # A row that has seen nothing yet stays at -inf, from which nothing may be subtracted.
                level = tl.where(above == -INFINITY, 0.0, above)
                p = exp(s - level[:, None])
                less = exp(largest - level)
                weight = weight * less + tl.sum(p, 1)
                if seed is not None:
                    four = first_j // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
                    kept = keep(tl.load(seed), four, number[:, None], plane, TAG, threshold)
                    p = tl.where(kept, p, 0.0)
                v = load_seen(value, first_j, readable, value_t, hidden, BLOCK_N, D, BLOCK_D)
                acc = tl.dot(p.to(v.dtype), v, acc * less[:, None], input_precision=PRECISION)
                largest = above
        any_key = weight > 0
        result = tl.where(any_key[:, None], acc * (keep_scale / tl.where(any_key, weight, 1.0))[:, None], 0.0)
        statistic = tl.where(any_key, largest + tl.log2(tl.where(any_key, weight, 1.0)) * LN2, INFINITY)
        if (key_lengths is not None) or (cu_seqlens is not None):
            result = tl.where(wrong, float("nan"), result)
        # A NaN among the scores is one in the weights.
        result = tl.where((weight != weight)[:, None], weight[:, None], result)
        statistic = tl.where(weight != weight, weight, statistic)
        store_rows(out + b * out_b + start * out_t + h * out_h, result, first_i, queries, out_t, BLOCK_M, D, BLOCK_D)
        row = first_i + tl.arange(0, BLOCK_M)
        tl.store(lse + b * lse_b + h * lse_h + start + row, statistic, mask=row < queries)


@triton.jit
def _bwd_rows(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    table,
    table_g,
    table_t,
    table_h,
    table_rows,
    offset,
    per_table,
    content_bias,
    position_bias,
    segment_bias,
    segment_embedding,
    query_segments,
    key_segments,
    positions,
    numbers,
    key_lengths,
    cu_seqlens,
    query_rank,
    key_rank,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    out,
    out_b,
    out_t,
    out_h,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_POSITION: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """delta and rest of every row: see `_bwd_rows` of attention."""
    block, plane = block_and_plane(queries, BLOCK_M)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    shift = keys - queries
    extent = keys
    at_i = b * queries
    at_j = b * keys
    start, queries, keys, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if cu_seqlens is not None:
        extent = keys
        at_i = start
        at_j = start
    TWO: tl.constexpr = positions is None
    SPARSE: tl.constexpr = (key_rank is not None) or (mask is not None)
    # Where a row without any key averages over all of them, all of them are read.
    readable = keys
    hidden = key_rank
    if key_rank is not None:
        key_rank += at_j
        hidden += at_j
    if UNIFORM:
        readable = extent
        hidden = None
    if key_segments is not None:
        key_segments += at_j
    if mask is not None:
        mask += b * mask_b + h * mask_h
    table += (b // per_table) * table_g + h * table_h
    query += b * query_b + start * query_t + h * query_h
    key += b * key_b + start * key_t + h * key_h
    value += b * value_b + start * value_t + h * value_h
    lse += b * lse_b + h * lse_h + start
    delta += b * lse_b + h * lse_h + start
    rest += b * lse_b + h * lse_h + start
    dout += b * dout_b + start * dout_t + h * dout_h
    first_i = block * BLOCK_M
    if first_i < queries:
        row = first_i + tl.arange(0, BLOCK_M)
        statistic = tl.load(lse + row, mask=row < queries, other=INFINITY)
        seen = statistic != INFINITY
        out += b * out_b + start * out_t + h * out_h
        do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D).to(tl.float32)
        result = load_rows(out, first_i, queries, out_t, BLOCK_M, D, BLOCK_D).to(tl.float32)
        tl.store(delta + row, tl.sum(tl.where(seen[:, None], do * result, 0.0), 1), mask=row < queries)
        sum = tl.full((BLOCK_M,), 1.0, tl.float32)
        inexact = seen & (tl.abs(statistic) >= 64.0)
        if tl.max(inexact.to(tl.int32), 0) > 0:
            sum = tl.zeros((BLOCK_M,), tl.float32)
            number, position, there, top, bottom = lines(first_i, at_i, queries, positions, numbers, BLOCK_M)
            _q, content, place_part, same, different, segment = prepared(
                query, first_i, queries, query_t, there, at_i, h, heads, content_bias, position_bias, segment_bias,
                segment_embedding, query_segments, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
            rank, highest = load_ranks(query_rank, at_i, first_i, queries, there, BLOCK_M)
            mask_row = number
            if BY_POSITION:
                mask_row = position
            high = readable
            if CAUSAL and not UNIFORM and TWO:
                high = tl.minimum(keys, tl.maximum(first_i + BLOCK_M + shift, 0))
            for first_j in range(0, high, BLOCK_N):
                j = first_j + tl.arange(0, BLOCK_N)
                live = True
                if SPARSE:
                    live = some_seen(
                        first_i, first_j, number[:, None], j[None, :], there[:, None], rank, highest,
                        key_rank, mask, mask_i, mask_j, mask_row[:, None], keys, extent, shift,
                        statistic > 0.5 * UNIFORM_SCORE, CAUSAL, SEE_SELF, UNIFORM, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                if live:
                    k = load_seen(key, first_j, readable, key_t, hidden, BLOCK_N, D, BLOCK_D)
                    s = skewed(
                        place_part, table, offset + first_j - top, table_rows, table_t, None, top - position,
                        top - bottom, TWO, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    s = row_products(content, k, s, PRECISION)
                    s = finished(
                        s, number[:, None], j[None, :], there[:, None], same[:, None], different[:, None],
                        segment, key_segments, rank, key_rank, mask, mask_i, mask_j, mask_row[:, None],
                        queries, keys, extent, shift, scale, CAUSAL, SEE_SELF, UNIFORM,
                    )  # fmt: skip
                    sum += tl.sum(exp(s - statistic[:, None]), 1)
        tl.store(rest + row, tl.where(inexact, tl.log2(tl.where(inexact, sum, 1.0)) * LN2, 0.0), mask=row < queries)


@triton.jit
def _bwd_keys(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    table,
    table_g,
    table_t,
    table_h,
    table_rows,
    offset,
    per_table,
    content_bias,
    position_bias,
    segment_bias,
    segment_embedding,
    query_segments,
    key_segments,
    positions,
    numbers,
    key_lengths,
    cu_seqlens,
    query_rank,
    key_rank,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    dkey,
    dkey_b,
    dkey_t,
    dkey_h,
    dvalue,
    dvalue_b,
    dvalue_t,
    dvalue_h,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_POSITION: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dkey and dvalue of BLOCK_N keys."""
    block, plane = block_and_plane(keys, BLOCK_N)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    shift = keys - queries
    extent = keys
    at_i = b * queries
    at_j = b * keys
    start, queries, keys, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if cu_seqlens is not None:
        extent = keys
        at_i = start
        at_j = start
    TWO: tl.constexpr = positions is None
    SPARSE: tl.constexpr = (key_rank is not None) or (mask is not None)
    # Where a row without any key averages over all of them, all of them are read.
    readable = keys
    hidden = key_rank
    if key_rank is not None:
        key_rank += at_j
        hidden += at_j
    if UNIFORM:
        readable = extent
        hidden = None
    if key_segments is not None:
        key_segments += at_j
    if mask is not None:
        mask += b * mask_b + h * mask_h
    table += (b // per_table) * table_g + h * table_h
    query += b * query_b + start * query_t + h * query_h
    key += b * key_b + start * key_t + h * key_h
    value += b * value_b + start * value_t + h * value_h
    lse += b * lse_b + h * lse_h + start
    delta += b * lse_b + h * lse_h + start
    rest += b * lse_b + h * lse_h + start
    dout += b * dout_b + start * dout_t + h * dout_h
    first_j = block * BLOCK_N
    if first_j < extent:
        v = load_seen(value, first_j, readable, value_t, hidden, BLOCK_N, D, BLOCK_D)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        low = 0
        if CAUSAL and not UNIFORM and TWO:
            low = tl.maximum(first_j - shift, 0) // BLOCK_M * BLOCK_M
        high = tl.where(first_j < readable, queries, 0)
        for first_i in range(low, high, BLOCK_M):
            number, position, there, top, bottom = lines(first_i, at_i, queries, positions, numbers, BLOCK_M)
            rank, highest = load_ranks(query_rank, at_i, first_i, queries, there, BLOCK_M)
            mask_row = number
            if BY_POSITION:
                mask_row = position
            row = first_i + tl.arange(0, BLOCK_M)
            statistic = tl.load(lse + row, mask=row < queries, other=INFINITY)
            j = first_j + tl.arange(0, BLOCK_N)
            live = True
            if SPARSE:
                live = some_seen(
                    first_i, first_j, number[:, None], j[None, :], there[:, None], rank, highest,
                    key_rank, mask, mask_i, mask_j, mask_row[:, None], keys, extent, shift,
                    statistic > 0.5 * UNIFORM_SCORE, CAUSAL, SEE_SELF, UNIFORM, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if live:
                q, content, place_part, same, different, segment = prepared(
                    query, first_i, queries, query_t, there, at_i, h, heads, content_bias, position_bias, segment_bias,
                    segment_embedding, query_segments, D, BLOCK_D, BLOCK_M,
                )  # fmt: skip
                product = tl.load(delta + row, mask=row < queries, other=0.0)
                more = tl.load(rest + row, mask=row < queries, other=0.0)
                do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D)
                do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
                k = load_seen(key, first_j, readable, key_t, hidden, BLOCK_N, D, BLOCK_D)
                s = skewed(
                    place_part, table, offset + first_j - top, table_rows, table_t, None, top - position, top - bottom,
                    TWO, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                s = row_products(content, k, s, PRECISION)
                s = finished(
                    s, number[:, None], j[None, :], there[:, None], same[:, None], different[:, None],
                    segment, key_segments, rank, key_rank, mask, mask_i, mask_j, mask_row[:, None],
                    queries, keys, extent, shift, scale, CAUSAL, SEE_SELF, UNIFORM,
                )  # fmt: skip
                p = exp((s - statistic[:, None]) - more[:, None])
                dp = row_products(do, v, None, PRECISION)
                dropped = p
                if seed is not None:
                    four = first_j // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
                    kept = keep(tl.load(seed), four, number[:, None], plane, TAG, threshold)
                    dropped = tl.where(kept, p * keep_scale, 0.0)
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                dv = add_product(tl.trans(dropped.to(do.dtype)), do, dv, PRECISION)
                g = p * (dp - product[:, None])
                if CAUSAL and UNIFORM:
                    # Such a score is a constant.
                    g = tl.where(j[None, :] <= number[:, None] + shift, g, 0.0)
                dk = add_product(tl.trans(g.to(q.dtype)), content, dk, PRECISION)
        dkey += b * dkey_b + start * dkey_t + h * dkey_h
        dvalue += b * dvalue_b + start * dvalue_t + h * dvalue_h
        store_rows(dkey, dk * scale, first_j, extent, dkey_t, BLOCK_N, D, BLOCK_D)
        store_rows(dvalue, dv, first_j, extent, dvalue_t, BLOCK_N, D, BLOCK_D)


@triton.jit
def _bwd_queries(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    table,
    table_g,
    table_t,
    table_h,
    table_rows,
    offset,
    per_table,
    content_bias,
    position_bias,
    segment_bias,
    segment_embedding,
    query_segments,
    key_segments,
    positions,
    numbers,
    key_lengths,
    cu_seqlens,
    query_rank,
    key_rank,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    dquery,
    dquery_b,
    dquery_t,
    dquery_h,
    parts,
    dtable,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_POSITION: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CARRY: tl.constexpr,
):
    """dquery of BLOCK_M queries, and what they add to the gradients of the biases and of the segment embedding.

    With a dtable also what they add to the gradient of the table, by atomics.
    """
    block, plane = block_and_plane(queries, BLOCK_M)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    shift = keys - queries
    extent = keys
    at_i = b * queries
    at_j = b * keys
    start, queries, keys, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if cu_seqlens is not None:
        extent = keys
        at_i = start
        at_j = start
    TWO: tl.constexpr = positions is None
    ROLLED: tl.constexpr = CARRY and positions is None
    SPARSE: tl.constexpr = (key_rank is not None) or (mask is not None)
    # Long rows of float32 do not leave room for everything: where that spilled, `do` is loaded again for each tile.
    LONG: tl.constexpr = PRECISION == "ieee" and query.dtype.element_ty == tl.float32 and D > 64
    RELOAD: tl.constexpr = LONG and ((positions is None) or SPARSE or (seed is not None))
    PIECES: tl.constexpr = 2 if positions is None else 4
    # Where a row without any key averages over all of them, all of them are read.
    readable = keys
    hidden = key_rank
    if key_rank is not None:
        key_rank += at_j
        hidden += at_j
    if UNIFORM:
        readable = extent
        hidden = None
    if key_segments is not None:
        key_segments += at_j
    if mask is not None:
        mask += b * mask_b + h * mask_h
    group = b // per_table
    table += group * table_g + h * table_h
    dtable_t = heads * D
    if dtable is not None:
        dtable += group * table_rows * dtable_t + h * D
    query += b * query_b + start * query_t + h * query_h
    key += b * key_b + start * key_t + h * key_h
    value += b * value_b + start * value_t + h * value_h
    lse += b * lse_b + h * lse_h + start
    delta += b * lse_b + h * lse_h + start
    rest += b * lse_b + h * lse_h + start
    dout += b * dout_b + start * dout_t + h * dout_h
    first_i = block * BLOCK_M
    dq_content = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq_position = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    g_same = tl.zeros((BLOCK_M,), tl.float32)
    g_different = tl.zeros((BLOCK_M,), tl.float32)
    # Of each row the sum of all gradients, and the weight of the keys of the other segment.
    g_total = tl.zeros((BLOCK_M,), tl.float32)
    other_weight = tl.zeros((BLOCK_M,), tl.float32)
    wide = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if first_i < queries:
        number, position, there, top, bottom = lines(first_i, at_i, queries, positions, numbers, BLOCK_M)
        q, content, place_part, same, different, segment = prepared(
            query, first_i, queries, query_t, there, at_i, h, heads, content_bias, position_bias, segment_bias,
            segment_embedding, query_segments, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        rank, highest = load_ranks(query_rank, at_i, first_i, queries, there, BLOCK_M)
        mask_row = number
        if BY_POSITION:
            mask_row = position
        row = first_i + tl.arange(0, BLOCK_M)
        statistic = tl.load(lse + row, mask=row < queries, other=INFINITY)
        product = tl.load(delta + row, mask=row < queries, other=0.0)
        more = tl.load(rest + row, mask=row < queries, other=0.0)
        if not RELOAD:
            do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D)
            do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
        moved = top - position
        if ROLLED:
            # Of the tile before: the upper block of its band, and its gradients that belong there.
            band = products(place_part, table, offset - top, table_rows, table_t, None, PRECISION, D, BLOCK_D, BLOCK_N)
            carried = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            band_at = 0
        high = readable
        if CAUSAL and not UNIFORM and TWO:
            high = tl.minimum(keys, tl.maximum(first_i + BLOCK_M + shift, 0))
        for first_j in range(0, high, BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)
            live = True
            if SPARSE:
                live = some_seen(
                    first_i, first_j, number[:, None], j[None, :], there[:, None], rank, highest,
                    key_rank, mask, mask_i, mask_j, mask_row[:, None], keys, extent, shift,
                    statistic > 0.5 * UNIFORM_SCORE, CAUSAL, SEE_SELF, UNIFORM, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if live:
                k = load_seen(key, first_j, readable, key_t, hidden, BLOCK_N, D, BLOCK_D)
                if ROLLED:
                    if SPARSE and band_at != first_j:
                        band = products(
                            place_part, table, offset + first_j - top, table_rows, table_t, None,
                            PRECISION, D, BLOCK_D, BLOCK_N,
                        )  # fmt: skip
                    s, band = rolled(
                        place_part, band, table, offset + first_j - top, table_rows, table_t, moved,
                        PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                else:
                    s = skewed(
                        place_part, table, offset + first_j - top, table_rows, table_t, None, moved, top - bottom,
                        TWO, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                s = row_products(content, k, s, PRECISION, PIECES)
                s = finished(
                    s, number[:, None], j[None, :], there[:, None], same[:, None], different[:, None],
                    segment, key_segments, rank, key_rank, mask, mask_i, mask_j, mask_row[:, None],
                    queries, keys, extent, shift, scale, CAUSAL, SEE_SELF, UNIFORM,
                )  # fmt: skip
                p = exp((s - statistic[:, None]) - more[:, None])
                v = load_seen(value, first_j, readable, value_t, hidden, BLOCK_N, D, BLOCK_D)
                if RELOAD:
                    do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D)
                    do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
                dp = row_products(do, v, None, PRECISION, PIECES)
                if seed is not None:
                    four = first_j // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
                    kept = keep(tl.load(seed), four, number[:, None], plane, TAG, threshold)
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                g = p * (dp - product[:, None]) * scale
                if CAUSAL and UNIFORM:
                    if key_segments is not None:
                        g_total += tl.sum(g, 1)
                    # Such a score is a constant.
                    g = tl.where(j[None, :] <= number[:, None] + shift, g, 0.0)
                if key_segments is not None:
                    kind = tl.load(key_segments + j, mask=j < extent, other=0)[None, :]
                    g_same += tl.sum(tl.where(segment != kind, 0.0, g), 1)
                    g_different += tl.sum(tl.where(segment != kind, g, 0.0), 1)
                    other_weight += tl.sum(tl.where(segment != kind, p, 0.0), 1)
                dq_content = add_product(g.to(q.dtype), k, dq_content, PRECISION)
                if ROLLED:
                    if SPARSE and band_at != first_j:
                        dq_position = add_chunk(
                            dq_position, carried, dtable, place_part, table, offset + band_at - top, table_rows,
                            table_t, dtable_t, PRECISION, D, BLOCK_D, BLOCK_N,
                        )  # fmt: skip
                        carried = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    back = rotated(g, -moved, BLOCK_M, BLOCK_N)
                    inside = tl.arange(0, BLOCK_N)[None, :] >= moved[:, None]
                    dq_position = add_chunk(
                        dq_position, tl.where(inside, back, carried), dtable, place_part, table, offset + first_j - top,
                        table_rows, table_t, dtable_t, PRECISION, D, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                    carried = tl.where(inside, 0.0, back)
                    band_at = first_j + BLOCK_N
                elif TWO:
                    back = rotated(g, -moved, BLOCK_M, BLOCK_N)
                    inside = tl.arange(0, BLOCK_N)[None, :] >= moved[:, None]
                    dq_position = add_chunk(
                        dq_position, tl.where(inside, back, 0.0), dtable, place_part, table, offset + first_j - top,
                        table_rows, table_t, dtable_t, PRECISION, D, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                    dq_position = add_chunk(
                        dq_position, tl.where(inside, 0.0, back), dtable, place_part, table,
                        offset + first_j - top + BLOCK_N, table_rows, table_t, dtable_t,
                        PRECISION, D, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                else:
                    dq_position = add_band(
                        dq_position, g, dtable, place_part, table, offset + first_j - top, table_rows, table_t,
                        dtable_t, moved, top - bottom, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
        if ROLLED:
            dq_position = add_chunk(
                dq_position, carried, dtable, place_part, table, offset + band_at - top, table_rows, table_t,
                dtable_t, PRECISION, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip
        if key_segments is not None:
            # Gradients of a row are p (dp - delta), and their sum is 0: what is found instead is the error of delta, a
            # sum over rounded results, times the weights.
            if not (CAUSAL and UNIFORM):
                g_total = g_same + g_different
            g_same -= g_total * (1.0 - other_weight)
            g_different -= g_total * other_weight
        same_vector = load_vector(segment_embedding, h, D, BLOCK_D)[None, :]
        other_vector = load_vector(segment_embedding, heads + h, D, BLOCK_D)[None, :]
        dq_segment = g_same[:, None] * same_vector + g_different[:, None] * other_vector
        dquery += b * dquery_b + start * dquery_t + h * dquery_h
        store_rows(dquery, dq_content + dq_position + dq_segment, first_i, queries, dquery_t, BLOCK_M, D, BLOCK_D)
        if query_segments is not None:
            # Loaded again, as registers are short in the loop.
            wide = load_rows(query, first_i, queries, query_t, BLOCK_M, D, BLOCK_D).to(tl.float32)
            wide = tl.where(there[:, None], wide, 0.0)
    # Blocks behind a packed sequence add zeros.
    d = tl.arange(0, BLOCK_D)
    asks = wide + load_vector(segment_bias, h, D, BLOCK_D)[None, :]
    parts += tl.program_id(0).to(tl.int64) * (5 * D) + d
    tl.store(parts, tl.sum(dq_content, 0), mask=d < D)
    tl.store(parts + D, tl.sum(dq_position, 0), mask=d < D)
    total_same = tl.sum(g_same, 0) * load_vector(segment_embedding, h, D, BLOCK_D)
    total_different = tl.sum(g_different, 0) * load_vector(segment_embedding, heads + h, D, BLOCK_D)
    tl.store(parts + 2 * D, total_same + total_different, mask=d < D)
    tl.store(parts + 3 * D, tl.sum(g_same[:, None] * asks, 0), mask=d < D)
    tl.store(parts + 4 * D, tl.sum(g_different[:, None] * asks, 0), mask=d < D)


@triton.jit
def add_chunk(
    acc,
    chunk,
    dtable,
    place_part,
    table,
    first,
    table_rows,
    table_t,
    dtable_t,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc plus a block of gradients in the band's order times rows first .. of the table, and its part of a dtable."""
    chunk = chunk.to(table.dtype.element_ty)
    rows = load_seen(table, first, table_rows, table_t, None, BLOCK_N, D, BLOCK_D)
    acc = add_product(chunk, rows, acc, PRECISION)
    if dtable is not None:
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        inside = ((first + n >= 0) & (first + n < table_rows))[:, None] & (d < D)[None, :]
        part = tl.dot(tl.trans(chunk), place_part, input_precision=PRECISION)
        row = tl.cast(first + n, tl.int64) * dtable_t
        tl.atomic_add(dtable + row[:, None] + d[None, :], part, mask=inside, sem="relaxed")
    return acc


@triton.jit
def add_band(
    acc,
    g,
    dtable,
    place_part,
    table,
    first,
    table_rows,
    table_t,
    dtable_t,
    shift,
    spread,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc plus, for line m, the sum over n of g[m, n] times row first + n + shift_m: the counterpart of `skewed`."""
    c = tl.arange(0, BLOCK_N)[None, :]
    m = tl.arange(0, BLOCK_M)[:, None]
    flat = swizzled(g, BLOCK_M, BLOCK_N)
    for start in range(0, spread + BLOCK_N, BLOCK_N):
        n = c + start - shift[:, None]
        inside = (n >= 0) & (n < BLOCK_N)
        at = tl.reshape(place(m, tl.where(inside, n, 0), BLOCK_N), (BLOCK_M * BLOCK_N,))
        band = tl.where(inside, tl.reshape(tl.gather(flat, at, 0), (BLOCK_M, BLOCK_N)), 0.0)
        acc = add_chunk(
            acc, band, dtable, place_part, table, first + start, table_rows, table_t, dtable_t,
            PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    return acc


@triton.jit
def _bwd_table(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    table,
    table_g,
    table_t,
    table_h,
    table_rows,
    offset,
    per_table,
    content_bias,
    position_bias,
    segment_bias,
    segment_embedding,
    query_segments,
    key_segments,
    positions,
    numbers,
    key_lengths,
    cu_seqlens,
    query_rank,
    key_rank,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    dtable,
    CAUSAL: tl.constexpr,
    SEE_SELF: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_POSITION: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of BLOCK_N rows of the table, laid out by table row: element (m, n) is of the key at distance n."""
    block, table_plane = block_and_plane(table_rows, BLOCK_N)
    first_p = block * BLOCK_N
    group = table_plane // heads
    h = (table_plane % heads).to(tl.int64)
    TWO: tl.constexpr = positions is None
    SPARSE: tl.constexpr = (key_rank is not None) or (mask is not None)
    table += group.to(tl.int64) * table_g + h * table_h
    r = load_seen(table, first_p, table_rows, table_t, None, BLOCK_N, D, BLOCK_D)
    dr = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    n = tl.arange(0, BLOCK_N)[None, :]
    shift = keys - queries
    blocks = tl.cdiv(queries, BLOCK_M)
    for step in range(0, per_table * blocks):
        sequence_number = group * per_table + step // blocks
        first_i = step % blocks * BLOCK_M
        b = tl.cast(sequence_number, tl.int64)
        plane = sequence_number * heads + table_plane % heads
        # Names of their own: a size that is 1 is a constant, which a loop may not assign.
        start, rows, length, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
        extent = keys
        at_i = b * queries
        at_j = b * keys
        if cu_seqlens is not None:
            extent = length
            at_i = start
            at_j = start
        readable = length
        if UNIFORM:
            readable = extent
        number, position, there, top, bottom = lines(first_i, at_i, rows, positions, numbers, BLOCK_M)
        first_j = first_p - offset + bottom
        if (first_i < rows) & (first_j < readable) & (first_j + BLOCK_N + (top - bottom) > 0):
            own_rank = key_rank
            if key_rank is not None:
                own_rank = key_rank + at_j
            hidden = own_rank
            if UNIFORM:
                hidden = None
            own_segments = key_segments
            if key_segments is not None:
                own_segments = key_segments + at_j
            own_mask = mask
            if mask is not None:
                own_mask = mask + (b * mask_b + h * mask_h)
            rank, highest = load_ranks(query_rank, at_i, first_i, rows, there, BLOCK_M)
            mask_row = number
            if BY_POSITION:
                mask_row = position
            row = first_i + tl.arange(0, BLOCK_M)
            statistics = b * lse_b + h * lse_h + start + row
            statistic = tl.load(lse + statistics, mask=row < rows, other=INFINITY)
            moved = position - bottom
            j = first_j + n + moved[:, None]
            live = True
            if SPARSE:
                live = some_seen(
                    first_i, first_j, number[:, None], j, there[:, None], rank, highest,
                    own_rank, own_mask, mask_i, mask_j, mask_row[:, None], length, extent, shift,
                    statistic > 0.5 * UNIFORM_SCORE, CAUSAL, SEE_SELF, UNIFORM, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if live:
                q, content, place_part, same, different, segment = prepared(
                    query + (b * query_b + start * query_t + h * query_h), first_i, rows, query_t, there, at_i, h,
                    heads, content_bias, position_bias, segment_bias, segment_embedding, query_segments,
                    D, BLOCK_D, BLOCK_M,
                )  # fmt: skip
                product = tl.load(delta + statistics, mask=row < rows, other=0.0)
                more = tl.load(rest + statistics, mask=row < rows, other=0.0)
                do = load_rows(
                    dout + (b * dout_b + start * dout_t + h * dout_h), first_i, rows, dout_t, BLOCK_M, D, BLOCK_D
                )
                do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
                s = skewed(
                    content, key + (b * key_b + start * key_t + h * key_h), first_j, readable, key_t, hidden, moved,
                    top - bottom, TWO, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                s = row_products(place_part, r, s, PRECISION)
                s = finished(
                    s, number[:, None], j, there[:, None], same[:, None], different[:, None],
                    segment, own_segments, rank, own_rank, own_mask, mask_i, mask_j, mask_row[:, None],
                    rows, length, extent, shift, scale, CAUSAL, SEE_SELF, UNIFORM,
                )  # fmt: skip
                p = exp((s - statistic[:, None]) - more[:, None])
                dp = skewed(
                    do, value + (b * value_b + start * value_t + h * value_h), first_j, readable, value_t, hidden,
                    moved, top - bottom, TWO, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                if seed is not None:
                    kept = keep_each(tl.load(seed), j, number[:, None], plane, TAG, threshold)
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                g = p * (dp - product[:, None]) * scale
                if CAUSAL and UNIFORM:
                    # Such a score is a constant.
                    g = tl.where(j <= number[:, None] + shift, g, 0.0)
                dr = tl.dot(tl.trans(g.to(q.dtype)), place_part, dr, input_precision=PRECISION)
    base = dtable + (group.to(tl.int64) * table_rows * heads + h) * D
    store_rows(base, dr, first_p, table_rows, heads * D, BLOCK_N, D, BLOCK_D)
