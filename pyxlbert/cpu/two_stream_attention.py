"""two_stream_attention through the native module: both streams in one call of the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._attention import inputs_of
from pyxlbert.cpu._relative import Gradients, RelativeInputs, Rows, results_of
from pyxlbert.cpu._tensors import refusal
from pyxlbert.launch.relative import at_targets

# Tag.relative_attention and Tag.query_stream of csrc/cpu/philox.h.
_TAGS = (2, 3)


def supports(*tensors: Tensor | None) -> str | None:
    """CPU tensors in float32, bfloat16 and float16."""
    return refusal(*tensors)


def two_stream_attention_fwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_fwd`."""
    content, content_lse = results_of(content_query, None)
    query, query_lse = results_of(query_query, None)
    if content_lse.numel() + query_lse.numel() == 0:
        return content, content_lse, query, query_lse
    inputs, rows, targets = _call(
        content_query,
        query_query,
        key,
        value,
        position_key,
        (content_bias, position_bias, segment_bias, segment_embedding),
        offset,
        query_segments,
        key_segments,
        target_positions,
        key_lengths,
        query_rank,
        key_rank,
        attention_mask,
        uniform_rows,
        scale,
        dropout_p,
        seed,
        (content, content_lse, query, query_lse),
    )
    _C.cpu.two_stream_attention_fwd(inputs.native, rows.native, targets.native)
    return content, content_lse, query, query_lse


def _call(
    content_query: Tensor,
    query_query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor,
    parameters: tuple[Tensor | None, ...],
    offset: int,
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
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[RelativeInputs, Rows, Rows]:
    """The native description of a call: what the streams share, the content stream, the query stream.

    Without ranks and mask the content stream sees itself anyway.
    """
    content, content_lse, query, query_lse = results
    attention = inputs_of(
        content_query, key, value, key_lengths, None, attention_mask, None, False, scale, dropout_p, seed
    )
    inputs = RelativeInputs(
        attention,
        position_key,
        content_query.dtype,
        offset,
        parameters,
        key_rank,
        key_segments,
        uniform_rows,
    )
    hidden = query_rank is not None or attention_mask is not None
    rows = Rows(
        content_query,
        content_query.shape[1],
        content,
        content_lse,
        _TAGS[0],
        None,
        query_rank,
        query_segments,
        see_self=hidden,
    )
    targets = Rows(
        query_query,
        query_query.shape[1],
        query,
        query_lse,
        _TAGS[1],
        target_positions,
        at_targets(query_rank, target_positions),
        at_targets(query_segments, target_positions),
        mask_by_position=True,
    )
    return inputs, rows, targets


def two_stream_attention_bwd(
    dcontent: Tensor | None,
    dquery: Tensor | None,
    content: Tensor,
    content_lse: Tensor,
    query: Tensor,
    query_lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_bwd`."""
    *call, needs = arguments
    content_query, query_query, key, value, position_key, content_bias, position_bias, offset, *rest = call
    segment_bias, segment_embedding, query_segments, key_segments, target_positions, key_lengths, *rest = rest
    query_rank, key_rank, attention_mask, uniform_rows, scale, dropout_p, seed = rest
    parameters = (content_bias, position_bias, segment_bias, segment_embedding)
    gradients = Gradients((content_query, query_query), key, value, position_key, parameters, needs)
    if content_lse.numel() + query_lse.numel() == 0 or key.numel() == 0:
        return gradients.zeros()
    inputs, *rows = _call(
        content_query,
        query_query,
        key,
        value,
        position_key,
        parameters,
        offset,
        query_segments,
        key_segments,
        target_positions,
        key_lengths,
        query_rank,
        key_rank,
        attention_mask,
        uniform_rows,
        scale,
        dropout_p,
        seed,
        (content, content_lse, query, query_lse),
    )
    return gradients.run(_C.cpu.two_stream_attention_bwd, inputs, tuple(rows), (dcontent, dquery))
