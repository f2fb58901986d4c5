"""two_stream_attention in plain PyTorch: relative attention once for each stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.reference._attention import gradients_in_order
from pyxlbert.reference.philox import Tag
from pyxlbert.reference.relative_attention import Scores, Stream


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def two_stream_attention_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """content `[B, T, H, D]`, its lse `[B, H, T]`, query `[B, M, H, D]`, its lse `[B, H, M]`.

    Each stream is what `relative_attention_fwd` says.
    """
    content, query = _streams(call)
    (out, lse), (query_out, query_lse) = content.forward(), query.forward()
    return out.to(call.content_query.dtype), lse, query_out.to(call.query_query.dtype), query_lse


def two_stream_attention_with_weights(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """content `[B, T, H, D]`, query `[B, M, H, D]`, and each stream's weights after dropout, `[B, H, T, Tk]` and
    `[B, H, M, Tk]`, all in their queries' dtype; autograd differentiates all four.
    """
    content, query = _streams(call)
    (out, weights), (query_out, query_weights) = (x.with_weights(call.content_query.dtype) for x in (content, query))
    return out, query_out, weights, query_weights


def two_stream_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """Gradients of content_query, query_query, key, value, position_key, content_bias, position_bias, segment_bias,
    segment_embedding; each empty where its flag in `needs` is False.

    An output without a gradient (None) adds nothing.  What the streams share gets the sum of their gradients.
    """
    tensors = (
        *(call.content_query, call.query_query, call.key, call.value, call.position_key),
        *(call.content_bias, call.position_bias, call.segment_bias, call.segment_embedding),
    )
    total: list[Tensor | None] = [None] * len(tensors)
    for place, (stream, dout) in enumerate(zip(_streams(call), (call.dcontent, call.dquery), strict=True)):
        if dout is None:
            continue
        own, *shared = stream.backward(dout)
        total[place] = own
        for n, gradient in enumerate(shared, 2):
            earlier = total[n]
            total[n] = gradient if earlier is None else earlier + gradient
    found = tuple(
        torch.zeros_like(call.content_query if tensor is None else tensor) if gradient is None else gradient
        for gradient, tensor in zip(total, tensors, strict=True)
    )
    return gradients_in_order(found, tensors, call.needs)


def _streams(call: Any) -> tuple[Scores, Scores]:
    """The content stream, which sees itself under ranks or a mask, and the query stream, which never does.

    Row m of the query stream stands at position target_positions[m] (None: m) and takes the segment, the rank and
    the row of the mask of that position.
    """
    segments, rank, mask = call.query_segments, call.query_rank, call.attention_mask
    hidden = rank is not None or mask is not None
    content = Stream(call.content_query, segments, None, rank, hidden, mask, Tag.RELATIVE_ATTENTION)
    if call.target_positions is not None:
        place = call.target_positions.clamp(min=0).long()
        segments = None if segments is None else _rows_at(segments, 1, place)
        rank = None if rank is None else _rows_at(rank, 1, place)
        if mask is not None and mask.shape[2] != 1:
            mask = _rows_at(mask, 2, place[:, None, :, None])
    query = Stream(call.query_query, segments, call.target_positions, rank, False, mask, Tag.QUERY_STREAM)
    return Scores(call, content), Scores(call, query)


def _rows_at(x: Tensor, dim: int, place: Tensor) -> Tensor:
    """x at these places of `dim`; what is taken where there is no position at all is not read."""
    if x.shape[dim] == 0:
        return x.new_zeros((*x.shape[:dim], place.shape[dim], *x.shape[dim + 1 :]))
    return torch.take_along_dim(x, place, dim)
