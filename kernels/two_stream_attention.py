"""two_stream_attention in Triton: both streams by the kernels of `_relative.py`, one after the other.

The query stream's rows are sorted by position.  What the streams share, keys, values, table and biases, gets the sum of
both streams' gradients, each computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.launch.relative import Shared, asked, at_targets, with_zeros

from ._relative import Stream
from .relative_attention import supports

__all__ = ["supports", "two_stream_attention_bwd", "two_stream_attention_fwd"]

# Tags of the dropout bits, as in _philox.py.
_CONTENT, _QUERY = 2, 3


def two_stream_attention_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """content `[B, T, H, D]`, its lse `[B, H, T]`, query `[B, M, H, D]`, its lse `[B, H, M]`.

    The arguments are those of `pyxlbert.reference.two_stream_attention.two_stream_attention_fwd`.
    """
    content, query = _streams(*arguments)
    return *content.forward(), *query.forward()


def two_stream_attention_bwd(
    dcontent: Tensor | None,
    dquery: Tensor | None,
    content: Tensor,
    content_lse: Tensor,
    query: Tensor,
    query_lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients of content_query, query_query, key, value, position_key, content_bias, position_bias, segment_bias,
    segment_embedding; each empty where its flag in `needs`, the last argument, is False.

    An output without a gradient (None) adds nothing.
    """
    *call, needs = arguments
    streams = _streams(*call)
    given = ((dcontent, content, content_lse), (dquery, query, query_lse))
    both = dcontent is not None and dquery is not None
    found: dict[str, Tensor] = {}
    for name, stream, (dout, out, lse) in zip(("query", "second"), streams, given, strict=True):
        if dout is None:
            found[name] = torch.zeros_like(call[0] if name == "query" else call[1])
            continue
        gradients = stream.backward(dout, out, lse, torch.float32 if both else None)
        found[name] = gradients.pop("query")
        for shared, gradient in gradients.items():
            found[shared] = found[shared] + gradient if shared in found else gradient
    tensors = (*call[:7], *call[8:10])
    return asked(with_zeros(found, tensors[2:]), tensors, needs)


def _streams(
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
) -> tuple[Stream, Stream]:
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
    content = Stream(shared, content_query, query_segments, None, query_rank, hidden, False, _CONTENT)
    segments, rank = (at_targets(x, target_positions) for x in (query_segments, query_rank))
    return content, Stream(shared, query_query, segments, target_positions, rank, False, True, _QUERY)
