"""relative_attention in Triton; `_relative.py` has the kernels and draws the tile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert.launch.relative import Shared, asked

from ._configurations import refusal_of_heads
from ._relative import Stream

# Tag of the dropout bits, as in _philox.py.
_TAG = 2


def supports(*tensors: Tensor | None) -> str | None:
    """CUDA tensors in float32, bfloat16 and float16, with head sizes that fit into a tile."""
    return refusal_of_heads("relative_fwd", *tensors)


def relative_attention_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32.

    The arguments are those of `pyxlbert.reference.relative_attention.relative_attention_fwd`.
    """
    return _stream(*arguments).forward()


def relative_attention_bwd(dout: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, position_key, content_bias, position_bias, segment_bias, segment_embedding.

    Each has its tensor's shape and dtype, or is empty where its flag in `needs`, the last argument, is False.
    """
    *call, needs = arguments
    stream = _stream(*call)
    query, key, value, table, content_bias, position_bias, _, segment_bias, segment_embedding, *_ = call
    found = stream.backward(dout, out, lse)
    tensors = (query, key, value, table, content_bias, position_bias, segment_bias, segment_embedding)
    return asked(found, tensors, needs)


def _stream(
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
) -> Stream:
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
    return Stream(shared, query, query_segments, query_positions, query_rank, see_self, False, _TAG)
