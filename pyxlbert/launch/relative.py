"""What launchers of relative_attention and two_stream_attention share: a call as streams and what they have in common,
and its gradients by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxlbert.launch.attention import (
    QUERY_STREAM,
    RELATIVE_ATTENTION,
    ScoreOptions,
    StreamOptions,
    ranks_of_mask,
)

# The gradients of what streams share, in the order of the ops' results; before them those of "query" and, of a second
# stream, "second".
SHARED = ("key", "value", "table", "content", "position", "segment", "embedding")
# Those that are sums over all queries.
BIASES = SHARED[3:]


class Shared(NamedTuple):
    """What all streams of a call share; the first nine as in a call of `attention`.

    Attributes:
        options: what `attention` has of its own in a call.
        key_rank: of a call, and where there is a mask that hides keys from all queries those of `ranks_of_mask`.
        biases: of content, position and segments, and the segments' embedding.
    """

    key: Tensor
    value: Tensor
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    attention_mask: Tensor | None
    bias: None
    dropout_p: float
    seed: Tensor | None
    options: ScoreOptions
    table: Tensor
    offset: int
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    key_segments: Tensor | None
    key_rank: Tensor | None
    uniform_rows: bool


class Stream(NamedTuple):
    """The queries of one stream.

    Attributes:
        query: `[B, T, H, D]` or packed.
        segments, rank: `[B, T]` or packed, or None.
        positions: `[B, T]`, -1 for a row without one; None: a row's own number.
        last: the largest position that the table reaches, and the mask where its row is a query's position.
    """

    query: Tensor
    segments: Tensor | None
    positions: Tensor | None
    rank: Tensor | None
    options: StreamOptions
    last: int

    def far(self) -> Tensor | None:
        """Of every row whether its position is past the last, or None without positions.

        On a GPU nobody has refused such a row: it is left alone as one without a position is, and its result is NaN.
        """
        return None if self.positions is None else self.positions > self.last


def relative_call(call: Any) -> tuple[Shared, Stream]:
    """A call of relative_attention, forward or backward."""
    stream = Stream(
        *(call.query, call.query_segments, call.query_positions, call.query_rank),
        StreamOptions(call.see_self, False, RELATIVE_ATTENTION),
        call.offset,
    )
    shared = _shared(call, call.cu_seqlens, call.max_seqlen, call.causal, call.see_self, call.query.shape)
    return shared, _ranked(stream, shared)


def two_stream_call(call: Any) -> tuple[Shared, list[Stream]]:
    """A call of two_stream_attention: the content stream, which sees itself under ranks or a mask, and the query
    stream, which never does.
    """
    hidden = call.query_rank is not None or call.attention_mask is not None
    segments, rank = (at_targets(x, call.target_positions) for x in (call.query_segments, call.query_rank))
    content = StreamOptions(hidden, False, RELATIVE_ATTENTION)
    query = StreamOptions(False, True, QUERY_STREAM)
    shared = _shared(call, None, 0, False, hidden, call.content_query.shape)
    last = call.content_query.shape[1] - 1
    return shared, [
        _ranked(Stream(call.content_query, call.query_segments, None, call.query_rank, content, last), shared),
        _ranked(Stream(call.query_query, segments, call.target_positions, rank, query, last), shared),
    ]


def _ranked(stream: Stream, shared: Shared) -> Stream:
    """Queries of rank 0 where only the keys have ranks, those of a mask."""
    if shared.key_rank is None or stream.rank is not None:
        return stream
    return stream._replace(rank=stream.query.new_zeros(stream.query.shape[:2], dtype=torch.int32))


def _shared(
    call: Any, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, see_self: bool, queries: torch.Size
) -> Shared:
    key_rank = call.key_rank
    # Where a row without any key averages over all of them, all of them are read.
    if call.attention_mask is not None and not call.uniform_rows:
        own = max(0, call.key.shape[1] - queries[1]) if see_self else None
        key_rank = ranks_of_mask(call.attention_mask, call.key, key_rank, own)
    return Shared(
        *(call.key, call.value, call.key_lengths, cu_seqlens, max_seqlen, call.attention_mask, None),
        *(call.dropout_p, call.seed, ScoreOptions(call.scale, causal)),
        *(call.position_key, call.offset),
        (call.content_bias, call.position_bias, call.segment_bias, call.segment_embedding),
        *(call.key_segments, key_rank, call.uniform_rows),
    )


def wanted_gradients(queries: tuple[Tensor, ...], shared: Shared, needs: list[bool]) -> frozenset[str]:
    """The names of what `gradients_in_order` is asked for: nothing else need be computed."""
    tensors = (*queries, shared.key, shared.value, shared.table, *shared.biases)
    return frozenset(
        name for name, tensor, need in zip(_names(queries), tensors, needs, strict=True) if need and tensor is not None
    )


def _names(queries: tuple[Tensor, ...]) -> tuple[str, ...]:
    return (*("query", "second")[: len(queries)], *SHARED)


def gradients_in_order(
    found: dict[str, Tensor], queries: tuple[Tensor, ...], shared: Shared, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients in the order of the ops' results, each shaped and rounded as its tensor; empty where none is needed.

    Args:
        found: by name; "query" and, of two streams, "second", and those of SHARED, as far as they are needed.
        queries: of the streams.
        needs: a flag for each of queries, key, value, table, biases.
    """
    tensors = (*queries, shared.key, shared.value, shared.table, *shared.biases)
    return tuple(
        _like(found[name], tensor) if need and tensor is not None else queries[0].new_empty(0)
        for name, tensor, need in zip(_names(queries), tensors, needs, strict=True)
    )


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    # A view or a cast that changes nothing takes as long as a small kernel's launch.
    if gradient.dim() != tensor.dim():
        gradient = gradient.view(tensor.shape)
    return gradient if gradient.dtype is tensor.dtype else gradient.to(tensor.dtype)


def with_zeros(
    found: dict[str, Tensor], queries: tuple[Tensor, ...], shared: Shared, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Fills in zeros for tensors that want a gradient and have none."""
    tensors = (*queries, shared.key, shared.value, shared.table, *shared.biases)
    return found | {
        name: torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        for name, tensor in zip(_names(queries), tensors, strict=True)
        if name in wanted and name not in found
    }


def at_targets(x: Tensor | None, target_positions: Tensor | None) -> Tensor | None:
    """`[B, T]` of positions to `[B, M]` of targets; what a target gets that is absent or past the last is not read."""
    if x is None or target_positions is None:
        return x
    if x.shape[1] == 0:
        return x.new_zeros(target_positions.shape)
    return x.gather(1, target_positions.clamp(0, x.shape[1] - 1).long())
