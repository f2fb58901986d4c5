"""What the native glue of relative_attention and two_stream_attention shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._attention import address, in_place, strides
from pyxlbert.launch.rows import int32


def results_of(query: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """out like query and lse `[B, H, T]`, packed `[H, total]`, not initialised."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    *first, rows, heads, _ = query.shape
    return out, torch.empty((*first, heads, rows), dtype=torch.float32)


class RelativeInputs:
    """The native description of what all streams of a call share; it keeps the tensors it points to alive.

    Args:
        attention: what `inputs_of` of attention gives.
        parameters: content, position and segment bias and the segment embedding; None: absent.
    """

    def __init__(
        self,
        attention: tuple[Any, ...],
        position_key: Tensor,
        dtype: torch.dtype,
        offset: int,
        parameters: tuple[Tensor | None, ...],
        key_rank: Tensor | None,
        key_segments: Tensor | None,
        uniform_rows: bool,
    ) -> None:
        inputs, self._attention = attention
        # The products take one element type; a float32 table is rounded as autocast would.
        table = in_place(position_key.to(dtype))
        numbers = [int32(key_rank), int32(key_segments)]
        floats = [None if x is None else x.to(torch.float32).contiguous() for x in parameters]
        self._keep = (table, numbers, floats)
        self.native = _C.cpu.RelativeInputs(
            inputs,
            table.data_ptr(),
            strides(table),
            (table.shape[0] if table.dim() == 4 else 1, table.shape[-3], offset),
            *(address(x) for x in floats),
            *(address(x) for x in numbers),
            uniform_rows,
        )


class Rows:
    """The native description of one stream's queries; it keeps the tensors it points to alive."""

    def __init__(
        self,
        query: Tensor,
        count: int,
        out: Tensor,
        lse: Tensor,
        tag: int,
        positions: Tensor | None,
        rank: Tensor | None,
        segments: Tensor | None,
        *,
        see_self: bool = False,
        mask_by_position: bool = False,
    ) -> None:
        query, positions = in_place(query), int32(positions)
        order = None if positions is None else positions.argsort(dim=1, stable=True).to(torch.int32)
        numbers = (positions, order, int32(rank), int32(segments))
        self._keep = (query, out, lse, numbers)
        self.native = _C.cpu.QueryRows(
            query.data_ptr(),
            strides(query),
            count,
            out.data_ptr(),
            lse.data_ptr(),
            tag,
            *(address(x) for x in numbers),
            see_self,
            mask_by_position,
        )


class Gradients:
    """The gradients of a backward call, before they are cast to their tensors' dtypes.

    Args:
        queries: the queries of one or two streams.
        parameters: content, position and segment bias and the segment embedding; None: absent.
        needs: a flag for every query, key, value, position_key and the parameters.
    """

    def __init__(
        self,
        queries: tuple[Tensor, ...],
        key: Tensor,
        value: Tensor,
        position_key: Tensor,
        parameters: tuple[Tensor | None, ...],
        needs: list[bool],
    ) -> None:
        self._tensors = (*queries, key, value, position_key, *parameters)
        self._needs = needs
        # Rows that stand nowhere are not written by the kernels.
        self._queries = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in queries]
        self._rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value)]
        wanted = zip((position_key, *parameters), needs[len(queries) + 2 :], strict=True)
        self._floats = [
            torch.empty(x.shape, dtype=torch.float32) if need and x is not None else None for x, need in wanted
        ]

    def zeros(self) -> tuple[Tensor, ...]:
        """Of a call without a single pair."""
        for x in (*self._rows, *self._floats):
            if x is not None:
                x.zero_()
        return self._asked()

    def run(
        self,
        kernel: Callable[..., None],
        inputs: RelativeInputs,
        rows: tuple[Rows | None, Rows | None],
        douts: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, ...]:
        """All of them, by one call of the native `kernel`.  A stream without rows or dout adds nothing."""
        present = [x is not None and dout is not None for x, dout in zip(rows, douts, strict=True)]
        douts = [in_place(dout) if here else None for dout, here in zip(douts, present, strict=True)]
        queries = [*self._queries, None][:2]
        arguments = _C.cpu.RelativeAttentionBwd(
            inputs.native,
            *(x.native if here else _C.cpu.QueryRows() for x, here in zip(rows, present, strict=True)),
            [address(x) for x in douts],
            [(0, 0, 0) if x is None else strides(x) for x in douts],
            [address(x) for x in queries],
            *(x.data_ptr() for x in self._rows),
            [address(x) for x in self._floats],
        )
        kernel(arguments)
        return self._asked()

    def _asked(self) -> tuple[Tensor, ...]:
        found = (*self._queries, *self._rows, *self._floats)
        return tuple(
            gradient.to(tensor.dtype) if need and gradient is not None else self._queries[0].new_empty(0)
            for gradient, tensor, need in zip(found, self._tensors, self._needs, strict=True)
        )
