"""two_stream_attention through the CUDA kernels: tensors to addresses and strides, both streams in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.cuda._attention import QUERY_STREAM, RELATIVE_ATTENTION, refusal_of_heads
from pyxlbert.cuda._relative import Stream, backward, forward
from pyxlbert.streams import Shared, asked, at_targets, with_zeros

supports = refusal_of_heads


def two_stream_attention_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_fwd`, whose arguments these are."""
    shared, streams = _call(*arguments)
    (content, content_lse), (query, query_lse) = forward("two_stream_attention", shared, streams)
    return content, content_lse, query, query_lse


def two_stream_attention_bwd(
    dcontent: Tensor | None,
    dquery: Tensor | None,
    content: Tensor,
    content_lse: Tensor,
    query: Tensor,
    query_lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_bwd`, whose arguments these are.

    An output without a gradient (None) adds nothing.
    """
    *call, needs = arguments
    shared, streams = _call(*call)
    given = ((dcontent, content, content_lse), (dquery, query, query_lse))
    there = [n for n in (0, 1) if given[n][0] is not None]
    found = {name: torch.zeros_like(x) for name, x in (("query", call[0]), ("second", call[1]))}
    if there:
        own, common = backward(shared, [streams[n] for n in there], [given[n] for n in there])
        for n, gradient in zip(there, own, strict=True):
            found[("query", "second")[n]] = gradient
        found |= common
    tensors = (*call[:7], *call[8:10])
    return asked(with_zeros(found, tensors[2:]), tensors, needs)


def _call(
    content_query: Tensor,
    query_query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    offset: int,
    segment_bias: Tensor | None,
    segment_embedding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    target_positions: Tensor | None,
    key_lengths: Tensor | None,
    query_rank: Tensor | None,
    key_rank: Tensor | None,
    attention_mask: Tensor | None,
    uniform_rows: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Shared, list[Stream]]:
    """The content stream, which sees itself under ranks or a mask, and the query stream, which never does."""
    shared = Shared(
        key,
        value,
        position_key,
        offset,
        (content_bias, position_bias, segment_bias, segment_embedding),
        key_segments,
        key_lengths,
        None,
        0,
        key_rank,
        attention_mask,
        False,
        uniform_rows,
        scale,
        dropout_p,
        seed,
    )
    hidden = query_rank is not None or attention_mask is not None
    content = Stream(content_query, query_segments, None, query_rank, hidden, False, RELATIVE_ATTENTION)
    segments, rank = (at_targets(x, target_positions) for x in (query_segments, query_rank))
    return shared, [content, Stream(query_query, segments, target_positions, rank, False, True, QUERY_STREAM)]
