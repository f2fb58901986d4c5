"""What the native glue of relative_attention and two_stream_attention shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._attention import in_place, longest, native_call
from pyxlbert.launch.attention import lse_of, strides
from pyxlbert.launch.relative import SHARED, Shared, Stream, gradients_in_order
from pyxlbert.launch.rows import address, int32


class _Call:
    """The native description of what all streams of a call share; it keeps the tensors it points to alive."""

    def __init__(self, query: Tensor, shared: Shared) -> None:
        inputs, attention = native_call(query, shared, shared.options)
        # The products take one element type; a float32 table is rounded as autocast would.
        table = in_place(shared.table.to(query.dtype))
        numbers = [int32(shared.key_rank), int32(shared.key_segments)]
        floats = [None if x is None else x.to(torch.float32).contiguous() for x in shared.biases]
        self._keep = (attention, table, numbers, floats)
        self.native = _C.cpu.RelativeCall(
            inputs,
            table.data_ptr(),
            strides(table),
            (table.shape[0] if table.dim() == 4 else 1, table.shape[-3], shared.offset),
            *(address(x) for x in floats),
            *(address(x) for x in numbers),
            shared,
        )


class _Stream:
    """The native description of one stream's queries; it keeps the tensors it points to alive."""

    def __init__(self, stream: Stream, shared: Shared, out: Tensor, lse: Tensor) -> None:
        query, positions = in_place(stream.query), int32(stream.positions)
        order = None if positions is None else positions.argsort(dim=1, stable=True).to(torch.int32)
        numbers = (positions, order, int32(stream.rank), int32(stream.segments))
        self._keep = (query, out, lse, numbers)
        self.native = _C.cpu.Stream(
            query.data_ptr(),
            strides(query),
            query.shape[1] if shared.cu_seqlens is None else longest(shared.cu_seqlens),
            out.data_ptr(),
            lse.data_ptr(),
            *(address(x) for x in numbers),
            stream.options,
        )


def forward(kernel: Callable[..., None], shared: Shared, streams: list[Stream]) -> tuple[Tensor, ...]:
    """out and lse of each stream, by one call of the native `kernel`."""
    outs = [torch.empty_like(stream.query, memory_format=torch.contiguous_format) for stream in streams]
    lses = [lse_of(stream.query) for stream in streams]
    if lses[0].numel() or lses[-1].numel():
        inputs = _Call(streams[0].query, shared)
        rows = [_Stream(streams[n], shared, outs[n], lses[n]) for n in range(len(streams))]
        kernel(inputs.native, rows[0].native, rows[1].native if len(rows) > 1 else _C.cpu.Stream())
    return (outs[0], lses[0]) if len(streams) == 1 else (outs[0], lses[0], outs[1], lses[1])


def backward(
    kernel: Callable[..., None],
    shared: Shared,
    streams: list[Stream],
    results: list[tuple[Tensor | None, Tensor, Tensor]],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the streams' queries, then of key, value, table and biases, by one call of the native `kernel`.

    Args:
        results: dout, out and lse of each stream; one without a dout adds nothing.
        needs: a flag for each of them.
    """
    queries = tuple(stream.query for stream in streams)
    # Rows that stand nowhere are not written by the kernels.
    dqueries = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in queries]
    dkey, dvalue = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (shared.key, shared.value))
    # Those of table and biases are sums in float32.
    wanted = zip((shared.table, *shared.biases), needs[len(queries) + 2 :], strict=True)
    sums = [torch.empty(x.shape, dtype=torch.float32) if need and x is not None else None for x, need in wanted]
    if not any(lse.numel() for _, _, lse in results) or shared.key.numel() == 0:
        for x in (dkey, dvalue, *sums):
            if x is not None:
                x.zero_()
    else:
        inputs = _Call(queries[0], shared)
        rows = [_Stream(s, shared, out, lse) for s, (_, out, lse) in zip(streams, results, strict=True)]
        present = [rows[n].native if dout is not None else _C.cpu.Stream() for n, (dout, _, _) in enumerate(results)]
        douts = _pair([None if dout is None else in_place(dout) for dout, _, _ in results], None)
        arguments = _C.cpu.RelativeAttentionBwd(
            inputs.native,
            *_pair(present, _C.cpu.Stream()),
            [address(x) for x in douts],
            [(0, 0, 0) if x is None else strides(x) for x in douts],
            [address(x) for x in _pair(dqueries, None)],
            dkey.data_ptr(),
            dvalue.data_ptr(),
            [address(x) for x in sums],
        )
        kernel(arguments)
    names = ("query", "second")[: len(queries)]
    found = dict(zip((*names, *SHARED), (*dqueries, dkey, dvalue, *sums), strict=True))
    return gradients_in_order(found, queries, shared, needs)


def _pair(given: list[Any], absent: Any) -> list[Any]:
    """One or two, and what stands for a second stream if there is none."""
    return [*given, absent][:2]
