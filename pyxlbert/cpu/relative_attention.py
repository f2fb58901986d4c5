"""relative_attention through the native module: tensors to addresses and strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._attention import inputs_of, longest
from pyxlbert.cpu._relative import Gradients, RelativeInputs, Rows, results_of
from pyxlbert.cpu._tensors import refusal

# Tag.relative_attention of csrc/cpu/philox.h.
_TAG = 2


def supports(*tensors: Tensor | None) -> str | None:
    """CPU tensors in float32, bfloat16 and float16."""
    return refusal(*tensors)


def relative_attention_fwd(
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
) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.relative_attention.relative_attention_fwd`."""
    out, lse = results_of(query, cu_seqlens)
    if lse.numel() == 0:
        return out, lse
    attention = inputs_of(
        query, key, value, key_lengths, cu_seqlens, attention_mask, None, causal, scale, dropout_p, seed
    )
    inputs = RelativeInputs(
        attention,
        position_key,
        query.dtype,
        offset,
        (content_bias, position_bias, segment_bias, segment_embedding),
        key_rank,
        key_segments,
        uniform_rows,
    )
    count = longest(cu_seqlens) if cu_seqlens is not None else query.shape[1]
    rows = Rows(query, count, out, lse, _TAG, query_positions, query_rank, query_segments, see_self=see_self)
    _C.cpu.relative_attention_fwd(inputs.native, rows.native, _C.cpu.QueryRows())
    return out, lse


def relative_attention_bwd(dout: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.relative_attention.relative_attention_bwd`."""
    *call, needs = arguments
    query, key, value, position_key, content_bias, position_bias, offset, *rest = call
    segment_bias, segment_embedding, query_segments, key_segments, query_positions, *rest = rest
    key_lengths, cu_seqlens, _, query_rank, key_rank, see_self, *rest = rest
    attention_mask, causal, uniform_rows, scale, dropout_p, seed = rest
    parameters = (content_bias, position_bias, segment_bias, segment_embedding)
    gradients = Gradients((query,), key, value, position_key, parameters, needs)
    if lse.numel() == 0 or key.numel() == 0:
        return gradients.zeros()
    attention = inputs_of(
        query, key, value, key_lengths, cu_seqlens, attention_mask, None, causal, scale, dropout_p, seed
    )
    inputs = RelativeInputs(
        attention, position_key, query.dtype, offset, parameters, key_rank, key_segments, uniform_rows
    )
    count = longest(cu_seqlens) if cu_seqlens is not None else query.shape[1]
    rows = Rows(query, count, out, lse, _TAG, query_positions, query_rank, query_segments, see_self=see_self)
    return gradients.run(_C.cpu.relative_attention_bwd, inputs, (rows, None), (dout, None))
