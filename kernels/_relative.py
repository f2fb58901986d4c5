"""relative_attention and two_stream_attention in Triton, for one stream of queries: launches, forward and backward.

Forward walks the keys of a block of queries with a running softmax; a tile's position term is read from a skewed band
of the position table, as _skew.py draws it.  Backward has a kernel of its own for what it needs of every row first, for
dkey and dvalue, for dquery, and for the table.  Queries that stand anywhere (`query_positions`) are sorted by position
first.  Tiles that ranks or a mask empty are left out, after a look at the ranks or the mask.

The gradient of the table has a program per block of its rows and share of the sequences, which walks all their queries:
there the scores are laid out by table row, and keys and values are what is skewed.  The shares are added up in order by
a launch of their own.  Nothing is added up by two programs, unless `pyxlbert.allow_atomics` lets the kernel of dquery
add to the table's gradient on its way.

Source: Dai et al., "Transformer-XL", https://arxiv.org/abs/1901.02860, appendix B (`rel_shift`); Yang et al., "XLNet",
https://arxiv.org/abs/1906.08237, section 2.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
import triton
from torch import Tensor

from pyxlbert import backends
from pyxlbert.launch.relative import BIASES, Shared
from pyxlbert.launch.relative import Stream as Queries
from pyxlbert.launch.rows import int32

from ._attention import (
    broadcast_of,
    coded,
    constants_of,
    decoded,
    grid_of,
    padded,
    rows_of,
    saved_of,
    sizes_of,
    statistics_of,
)
from ._configurations import COMPILE_OPTIONS, configuration
from ._launch import launch
from ._parts import join_parts, partial_of
from ._philox import dropout_of
from ._relative_bwd import bwd_keys, bwd_rows, bwd_table
from ._relative_bwd_queries import bwd_queries
from ._relative_fwd import fwd
from ._relative_scores import Biases, Call, Marks, Options, Table
from ._rows import sum_parts

# The table's gradient is shared out among about so many programs, with at least so many queries each.
PROGRAMS, QUERIES_OF_PART = 1024, 512


class Stream:
    """The queries of one stream as the kernels take them, sorted by position if they have any."""

    def __init__(self, shared: Shared, stream: Queries) -> None:
        query, self.shared, self.stream = stream.query, shared, stream
        self.order: Tensor | None = None
        positions, segments, rank = int32(stream.positions), int32(stream.segments), int32(stream.rank)
        self.far = stream.far()
        if positions is not None:
            # A tile walks the band between its first and its last position, however far that is.
            positions = positions.masked_fill(self.far, -1)
            self.order = positions.argsort(dim=1, stable=True)
            positions, segments, rank = (
                None if x is None else x.gather(1, self.order) for x in (positions, segments, rank)
            )
        self.query = self.sorted(query)
        self.heads, self.head_size = query.shape[-2:]
        masked = shared.attention_mask is not None
        batch, self.sizes = sizes_of(shared, query, shared.key.shape[-3] if masked else None)
        table = shared.table.to(query.dtype)
        tables = table.shape[0] if table.dim() == 4 else 1
        self.table = Table(*rows_of(table), *map(coded, (table.shape[-3], shared.offset, max(1, batch // tables))))
        self.planes, self.tables = batch * self.heads, tables
        mask, dropout = broadcast_of(shared.attention_mask), dropout_of(shared.dropout_p, shared.seed)
        causal = shared.options.causal and decoded(self.sizes.queries) > decoded(self.sizes.keys)
        some = mask.tensor is not None or rank is not None or causal
        # Rows that see nothing: a row without a place does neither, and one of a sequence without keys is in no tile.
        self.empty = positions is not None or (some and not shared.uniform_rows)
        self.extras = mask.tensor is not None or dropout.seed is not None or rank is not None
        self.call = Call(
            *(rows_of(x) for x in (self.query, shared.key, shared.value)),
            self.table,
            Biases(*(None if x is None else x.contiguous() for x in shared.biases)),
            Marks(positions, int32(self.order), segments, int32(shared.key_segments), rank, int32(shared.key_rank)),
            mask,
            self.sizes,
            shared.options.scale,
            dropout,
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
        shared, stream = self.shared, self.stream
        name = kernel if self.order is None else f"{kernel}_positions"
        tile = configuration(name, self.query, self.extras, self.call.marks.key_segments is not None)
        return {
            "OPTIONS": Options(shared.options.causal, shared.uniform_rows, *stream.options, self.empty),
            **constants_of(self.head_size, self.query.dtype),
            **COMPILE_OPTIONS,
            **tile.constants(),
        }

    def sequences_of_part(self) -> int:
        """How many sequences a program of the table's gradient walks.

        It follows from the sizes alone: all of them, if there are programs enough or sequences are few and short.
        """
        sequences, queries = decoded(self.table.sequences), decoded(self.sizes.queries)
        programs = self.heads * triton.cdiv(decoded(self.table.rows), 64)
        if self.tables > 1:
            return sequences
        parts = max(1, min(sequences, PROGRAMS // programs))
        return min(sequences, max(triton.cdiv(sequences, parts), triton.cdiv(QUERIES_OF_PART, queries)))

    def rows_before(self) -> int:
        """How many rows before the table the first block of its gradient begins: with dropout so many that blocks begin
        with a key whose number 4 divides, and four are drawn at once.
        """
        return 0 if self.call.dropout.seed is None or self.order is not None else -decoded(self.table.offset) & 3

    def forward(self) -> tuple[Tensor, Tensor]:
        """out like query and lse `[B, H, T]`, packed `[H, total]`."""
        out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        *first, rows, heads, _ = self.query.shape
        lse = torch.empty((*first, heads, rows), dtype=torch.float32, device=out.device)
        if lse.numel() == 0:
            return out, lse
        options = self.options("relative_fwd")
        partial = partial_of(self.sizes, self.planes, out)
        parts = 1 if partial is None else decoded(partial.parts)
        grid = grid_of(decoded(self.sizes.queries), options["BLOCK_M"], self.planes * parts)
        results = rows_of(out), statistics_of(lse)
        launch(fwd, grid, out.device, self.call, *results, partial, **options)
        if partial is not None:
            join_parts(partial, self.sizes, *results, self.call.dropout.keep_scale)
        out, lse = self.unsorted(out), self._statistics(lse, back=True)
        if self.far is not None:
            out.masked_fill_(self.far[:, :, None, None], float("nan"))
            lse.masked_fill_(self.far[:, None], float("nan"))
        return out, lse

    def _statistics(self, lse: Tensor, back: bool = False) -> Tensor:
        if self.order is None:
            return lse.contiguous()
        order = self.order[:, None].expand_as(lse)
        if not back:
            # Backward leaves out what forward has.
            lse = lse.masked_fill(self.far[:, None], float("inf"))
        return torch.empty_like(lse).scatter_(2, order, lse) if back else lse.gather(2, order)

    def backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        wanted: Set[str],
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Gradients by name, those that are wanted among them; a kernel whose gradients nobody wants is not launched.

        Those of key and value are in `dtype` or their own, those of table and biases in float32.
        """
        shared, device = self.shared, self.query.device
        dquery = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        found = {}
        if wanted & {"key", "value"}:
            found |= {
                name: torch.empty_like(x, dtype=dtype or x.dtype, memory_format=torch.contiguous_format)
                for name, x in (("key", shared.key), ("value", shared.value))
            }
        if "table" in wanted:
            size = (self.tables, decoded(self.table.rows), self.heads, self.head_size)
            found["table"] = torch.empty(size, dtype=torch.float32, device=device)
        if lse.numel() == 0 or shared.key.numel() == 0:
            parts = torch.zeros(self.heads, 5, self.head_size, device=device)
            return {name: x.zero_() for name, x in (found | {"query": dquery}).items()} | _biases(parts)
        given = (self.call, rows_of(self.sorted(dout)))
        lse = self._statistics(lse)
        saved = saved_of(lse, self.sizes)
        options = self.options("relative_bwd_rows")
        grid = grid_of(padded(decoded(self.sizes.queries)), options["BLOCK_M"], self.planes)
        results = rows_of(self.sorted(out)), statistics_of(lse)
        launch(bwd_rows, grid, device, *given, *results, saved, **options)
        if "key" in found:
            options = self.options("relative_bwd_keys")
            grid = grid_of(decoded(self.sizes.keys), options["BLOCK_N"], self.planes)
            launch(bwd_keys, grid, device, *given, saved, rows_of(found["key"]), rows_of(found["value"]), **options)
        # With its gradient added up by atomics the table needs no kernel of its own, which repeats five products.  For
        # that much at once long rows of float32 would not fit a thread's registers.
        atomic = "table" in wanted and backends.atomics_allowed()
        atomic = atomic and (self.query.element_size() == 2 or self.head_size <= 64)
        summed = not wanted.isdisjoint(BIASES)
        parts = None
        if atomic or summed or "query" in wanted:
            options = self.options("relative_bwd_queries_table" if atomic else "relative_bwd_queries")
            grid = grid_of(decoded(self.sizes.queries), options["BLOCK_M"], self.planes)
            if summed:
                size = (self.planes, grid[0] // self.planes, 5, self.head_size)
                parts = torch.empty(size, dtype=torch.float32, device=device)
            added = found["table"].zero_() if atomic else None
            launch(bwd_queries, grid, device, *given, saved, rows_of(dquery), parts, added, **options)
        if "table" in wanted and not atomic:
            self._sum_table(found["table"], *given, saved)
        if "query" in wanted:
            found["query"] = self.unsorted(dquery)
        if parts is None:
            return found
        return found | _biases(parts.view(-1, self.heads, *parts.shape[1:]).sum((0, 2)))

    def _sum_table(self, table: Tensor, *given: Any) -> None:
        """The gradient of the table by a kernel of its own, in shares that are added up in order."""
        options = self.options("relative_bwd_table")
        each = self.sequences_of_part()
        parts = triton.cdiv(decoded(self.table.sequences), each)
        shares = table if parts == 1 else table.new_empty(parts, *table.shape[1:])
        rows = decoded(self.table.rows) + self.rows_before()
        grid = grid_of(rows, options["BLOCK_N"], self.tables * self.heads * parts)
        launch(bwd_table, grid, table.device, *given, shares, each, **options)
        if parts > 1:
            sum_parts(shares.view(1, parts, -1), table.view(-1))


def _biases(sums: Tensor) -> dict[str, Tensor]:
    """`[H, 5, D]`, what `bwd_queries` adds up of every block of queries, by name."""
    # Each a tensor of its own: what an op returns shares no memory.
    content, position, segment, same, other = (x.clone(memory_format=torch.contiguous_format) for x in sums.unbind(1))
    return {
        "content": content,
        "position": position,
        "segment": segment,
        "embedding": torch.stack([same, other]),
    }
