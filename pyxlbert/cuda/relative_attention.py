"""relative_attention through the CUDA kernels: tensors to addresses and strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert.cuda._attention import RELATIVE_ATTENTION, refusal_of_heads
from pyxlbert.cuda._relative import Stream, backward, forward
from pyxlbert.streams import Shared, asked

supports = refusal_of_heads


def relative_attention_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.relative_attention.relative_attention_fwd`, whose arguments these are."""
    shared, stream = _call(*arguments)
    return forward("relative_attention", shared, [stream])[0]


def relative_attention_bwd(dout: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.relative_attention.relative_attention_bwd`, whose arguments these are."""
    *call, needs = arguments
    shared, stream = _call(*call)
    (dquery,), found = backward(shared, [stream], [(dout, out, lse)])
    query, key, value, table, content_bias, position_bias, _, segment_bias, segment_embedding, *_ = call
    tensors = (query, key, value, table, content_bias, position_bias, segment_bias, segment_embedding)
    return asked({"query": dquery} | found, tensors, needs)


def _call(
    query: Tensor,
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
    query_positions: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    query_rank: Tensor | None,
    key_rank: Tensor | None,
    see_self: bool,
    attention_mask: Tensor | None,
    causal: bool,
    uniform_rows: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Shared, Stream]:
    shared = Shared(
        key,
        value,
        position_key,
        offset,
        (content_bias, position_bias, segment_bias, segment_embedding),
        key_segments,
        key_lengths,
        cu_seqlens,
        max_seqlen,
        key_rank,
        attention_mask,
        causal,
        uniform_rows,
        scale,
        dropout_p,
        seed,
    )
    return shared, Stream(query, query_segments, query_positions, query_rank, see_self, False, RELATIVE_ATTENTION)
