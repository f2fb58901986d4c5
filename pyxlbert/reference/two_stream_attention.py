"""two_stream_attention in plain PyTorch: relative attention once for each stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.reference.philox import Tag
from pyxlbert.reference.relative_attention import Scores, asked


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def two_stream_attention_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """content `[B, T, H, D]`, its lse `[B, H, T]`, query `[B, M, H, D]`, its lse `[B, H, M]`.

    `_streams` names the arguments; each stream is what `relative_attention_fwd` says.
    """
    content, query = _streams(*arguments)
    (out, lse), (query_out, query_lse) = content.forward(), query.forward()
    return out.to(arguments[0].dtype), lse, query_out.to(arguments[1].dtype), query_lse


def two_stream_attention_with_weights(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """content `[B, T, H, D]`, query `[B, M, H, D]`, and each stream's weights after dropout, `[B, H, T, Tk]` and
    `[B, H, M, Tk]`, all in their queries' dtype; autograd differentiates all four.
    """
    content, query = _streams(*arguments)
    (out, weights), (query_out, query_weights) = (x.with_weights(arguments[0].dtype) for x in (content, query))
    return out, query_out, weights, query_weights


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

    An output without a gradient (None) adds nothing.  What the streams share gets the sum of their gradients.
    """
    *call, needs = arguments
    tensors = (*call[:7], *call[8:10])
    total: list[Tensor | None] = [None] * len(tensors)
    for place, (stream, dout) in enumerate(zip(_streams(*call), (dcontent, dquery), strict=True)):
        if dout is None:
            continue
        own, *shared = stream.backward(dout)
        total[place] = own
        for n, gradient in enumerate(shared, 2):
            earlier = total[n]
            total[n] = gradient if earlier is None else earlier + gradient
    found = tuple(
        torch.zeros_like(call[0] if tensor is None else tensor) if gradient is None else gradient
        for gradient, tensor in zip(total, tensors, strict=True)
    )
    return asked(found, tensors, needs)


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
) -> tuple[Scores, Scores]:
    """The content stream, which sees itself under ranks or a mask, and the query stream, which never does.

    Row m of the query stream stands at position target_positions[m] (None: m) and takes the segment, the rank and
    the row of the mask of that position.
    """

    def stream(
        query: Tensor,
        segments: Tensor | None,
        positions: Tensor | None,
        rank: Tensor | None,
        see_self: bool,
        mask: Tensor | None,
        tag: Tag,
    ) -> Scores:
        return Scores(
            query,
            key,
            value,
            position_key,
            content_bias,
            position_bias,
            offset,
            segment_bias,
            segment_embedding,
            segments,
            key_segments,
            positions,
            key_lengths,
            None,
            0,
            rank,
            key_rank,
            see_self,
            mask,
            False,
            uniform_rows,
            scale,
            dropout_p,
            seed,
            tag,
        )

    hidden = query_rank is not None or attention_mask is not None
    content = stream(content_query, query_segments, None, query_rank, hidden, attention_mask, Tag.RELATIVE_ATTENTION)
    segments, rank, mask = query_segments, query_rank, attention_mask
    if target_positions is not None:
        place = target_positions.clamp(min=0).long()
        segments = None if segments is None else _rows_at(segments, 1, place)
        rank = None if rank is None else _rows_at(rank, 1, place)
        if mask is not None and mask.shape[2] != 1:
            mask = _rows_at(mask, 2, place[:, None, :, None])
    return content, stream(query_query, segments, target_positions, rank, False, mask, Tag.QUERY_STREAM)


def _rows_at(x: Tensor, dim: int, place: Tensor) -> Tensor:
    """x at these places of `dim`; what is taken where there is no position at all is not read."""
    if x.shape[dim] == 0:
        return x.new_zeros((*x.shape[:dim], place.shape[dim], *x.shape[dim + 1 :]))
    return torch.take_along_dim(x, place, dim)
