"""What the CUDA glue of relative_attention and two_stream_attention shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.cuda._attention import in_place, native_call, padded, split_keys, whole_vectors
from pyxlbert.cuda._launch import dtype_of, launch, shared_memory
from pyxlbert.launch.attention import lse_of, strides
from pyxlbert.launch.relative import BIASES, SHARED, Shared, Stream
from pyxlbert.launch.rows import DTYPE, address, int32

# Of 64 rows of the table and a head each: more than any device runs at a time, and about 8 MiB of sums at D = 64.
TABLE_BLOCKS = 512


def _rows(shared: Shared, query: Tensor) -> int:
    """Queries of a sequence; packed: at most."""
    return query.shape[-3] if shared.cu_seqlens is None else shared.max_seqlen


class _Call:
    """Streams and what they share, as the kernels take them; keeps alive what it names."""

    def __init__(self, shared: Shared, streams: list[Stream], outs: list[Tensor], statistics: list[Tensor]) -> None:
        query = streams[0].query
        self.columns = whole_vectors(query.shape[-1])
        self.keep: list[Any] = [shared, streams, outs, statistics]
        self.key, self.value = (in_place(padded(x, self.columns)) for x in (shared.key, shared.value))
        self.streams = [
            self._stream(shared, stream, out, lse) for stream, out, lse in zip(streams, outs, statistics, strict=True)
        ]
        self.shared = shared

    def build(self, parts: int = 1) -> Any:
        """The native description, with the streams as they are now.

        Args:
            parts: how often the one table is named, each time for a part of the batch.
        """
        shared, query = self.shared, self.keep[1][0].query
        shape = (*query.shape[:-1], self.columns)
        call, keep = native_call(self.streams, shape, self.key, self.value, shared, shared.options)
        table = in_place(padded(shared.table.to(query.dtype), self.columns))
        if table.dim() == 4 and table.shape[0] == 1:
            table = table[0]  # strides() then has none from table to table
        tables = table.shape[0] if table.dim() == 4 else parts
        biases = [None if x is None else in_place(padded(x, self.columns)).contiguous() for x in shared.biases]
        numbers = [int32(shared.key_rank), int32(shared.key_segments)]
        call.table(
            *(table.data_ptr(), strides(table), tables, table.shape[-3], shared.offset),
            *(value for x in biases for value in (address(x), dtype_of(x))),
            *(address(numbers[0]), address(numbers[1]), shared),
        )
        self.keep += [call, keep, table, biases, numbers]
        return call

    def _stream(self, shared: Shared, stream: Stream, out: Tensor, lse: Tensor) -> Any:
        query = in_place(padded(stream.query, self.columns))
        positions, numbers = int32(stream.positions), None
        if positions is not None:
            positions = positions.masked_fill(stream.far(), -1)
            positions, numbers = positions.sort(dim=1, stable=True)
            numbers = int32(numbers)
        rank, segments = int32(stream.rank), int32(stream.segments)
        self.keep += [query, positions, numbers, rank, segments]
        return backends.cuda_kernels.Stream(
            *(query.data_ptr(), strides(query), _rows(shared, query), address(positions), address(numbers)),
            *(address(rank), address(segments), stream.options, out.data_ptr(), lse.data_ptr()),
        )


def forward(op: str, shared: Shared, streams: list[Stream]) -> list[tuple[Tensor, Tensor]]:
    """out like its query and lse `[B, H, T]`, packed `[H, total]`, of each stream."""
    found = [_results(stream) for stream in streams]
    if any(lse.numel() for _, lse in found):
        call = _Call(shared, streams, *map(list, zip(*found, strict=True)))
        native = call.build()
        # A block that has queries of two streams has all keys.
        _partial = split_keys(native, found[0][0], shared.key.shape[-3]) if len(streams) == 1 else None
        launch(f"{op}_fwd", shared.key.device, native)
    return [
        (out if out.shape == stream.query.shape else out[..., : stream.query.shape[-1]].contiguous(), lse)
        for stream, (out, lse) in zip(streams, found, strict=True)
    ]


def _results(stream: Stream) -> tuple[Tensor, Tensor]:
    """out and lse; those of rows without a position, or of one past the last, as they are to be."""
    query, far = stream.query, stream.far()
    out = query.new_empty((*query.shape[:-1], whole_vectors(query.shape[-1])))
    lse = lse_of(query)
    if far is not None:
        out.zero_().masked_fill_(far[:, :, None, None], float("nan"))
        lse.fill_(float("inf")).masked_fill_(far[:, None, :], float("nan"))
    return out, lse


def backward(
    shared: Shared, given: dict[str, tuple[Stream, tuple[Tensor, Tensor, Tensor]]], wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients by name, all that are wanted and maybe others: of table and biases in float32.

    What nobody wants has no address, and kernels that compute nothing else are not launched.

    Args:
        given: of each stream by the name of its query's gradient: its queries; dout, out and lse.
        wanted: see `pyxlbert.launch.relative.wanted_gradients`.
    """
    streams, results = [stream for stream, _ in given.values()], [results for _, results in given.values()]
    query = streams[0].query
    heads, head_size = query.shape[-2:]
    columns, device = whole_vectors(head_size), query.device
    lses = [lse.contiguous() for _, _, lse in results]
    outs = [in_place(padded(out, columns)).contiguous() for _, out, _ in results]
    if all(lse.numel() == 0 for lse in lses) or shared.key.numel() == 0:
        tensors = dict(zip(SHARED, (shared.key, shared.value, shared.table, *shared.biases), strict=True))
        tensors |= {name: stream.query for name, (stream, _) in given.items()}
        return {
            name: torch.zeros_like(x, memory_format=torch.contiguous_format)
            for name, x in tensors.items()
            if name in wanted and x is not None
        }
    call = _Call(shared, streams, outs, lses)
    planes = heads * (shared.key.shape[0] if shared.cu_seqlens is None else shared.cu_seqlens.shape[0] - 1)
    summed = not wanted.isdisjoint(BIASES)
    found, parts, table_parts = {}, [], 1
    for n, (name, stream, (dout, _, _), lse) in enumerate(zip(given, call.streams, results, lses, strict=True)):
        dout = in_place(padded(dout, columns))
        workspace = [torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(outs[n]), torch.empty_like(outs[n])]
        dquery, part = None, None
        if summed or name in wanted:
            dquery = torch.empty_like(outs[n]) if streams[n].positions is None else torch.zeros_like(outs[n])
            found[name] = dquery
        if summed:
            rows = _rows(shared, streams[n].query)
            positions = rows if streams[n].positions is None or rows == 0 else shared.offset + 1
            room = shared_memory(device)
            windows = backends.cuda_kernels.windows_of_parts(DTYPE[query.dtype], columns, positions, room)
            part = torch.empty(planes, windows, 5, columns, dtype=torch.float32, device=device)
            parts.append(part)
        delta, lse_correction, content, position = (x.data_ptr() for x in workspace)
        stream.gradients(
            *(dout.data_ptr(), strides(dout), delta, lse_correction, address(dquery), content, position),
            address(part),
        )
        call.keep += [dout, workspace]
    if wanted & {"key", "value"}:
        found |= {name: x.new_empty((*x.shape[:-1], columns)) for name, x in zip(SHARED, shared[:2], strict=False)}
    if "table" in wanted:
        tables = shared.table.shape[0] if shared.table.dim() == 4 else 1
        rows, batch = shared.table.shape[-3], planes // heads
        table_parts = parts_of_table(rows, heads, batch) if tables == 1 else 1
        size = (tables * table_parts, rows, heads, columns)
        found["table"] = torch.empty(size, dtype=torch.float32, device=device)
    native = call.build(table_parts)
    native.gradients(*(address(found.get(name)) for name in ("key", "value", "table")), 0, (0, 0, 0, 0))
    launch("relative_attention_bwd", device, native)
    if table_parts > 1:
        found["table"] = found["table"].sum(0)
    if summed:
        found |= _biases(sum(part.view(planes // heads, heads, *part.shape[1:]).sum((0, 2)) for part in parts))
    return {name: x if x.shape[-1] == head_size else x[..., :head_size].contiguous() for name, x in found.items()}


def parts_of_table(rows: int, heads: int, batch: int) -> int:
    """Of how many sums over a part of the batch each the gradient of one table is made: so many that there are blocks
    for every multiprocessor, but no more.  It depends on sizes alone, and so do the bits.
    """
    wanted = min(batch, -(-TABLE_BLOCKS // max(1, -(-rows // 64) * heads)))
    each = max(1, -(-batch // max(1, wanted)))
    return max(1, -(-batch // each))


def _biases(sums: Tensor) -> dict[str, Tensor]:
    """`[H, 5, D]`, what the kernel of dquery adds up, by name."""
    # Each a tensor of its own: what an op returns shares no memory.
    content, position, segment, same, other = (x.clone(memory_format=torch.contiguous_format) for x in sums.unbind(1))
    return dict(zip(BIASES, (content, position, segment, torch.stack([same, other])), strict=True))
