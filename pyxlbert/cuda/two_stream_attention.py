"""two_stream_attention through the CUDA kernels: tensors to addresses and strides, both streams in one launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert.cuda._attention import refusal_of_heads
from pyxlbert.cuda._relative import backward, forward
from pyxlbert.launch.relative import gradients_in_order, two_stream_call, wanted_gradients, with_zeros

supports = refusal_of_heads


def two_stream_attention_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_fwd`."""
    (content, content_lse), (query, query_lse) = forward("two_stream_attention", *two_stream_call(call))
    return content, content_lse, query, query_lse


def two_stream_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_bwd`.

    An output without a gradient (None) adds nothing.
    """
    shared, streams = two_stream_call(call)
    given = ((call.dcontent, call.content, call.content_lse), (call.dquery, call.query, call.query_lse))
    queries = (call.content_query, call.query_query)
    wanted = wanted_gradients(queries, shared, call.needs)
    named = zip(("query", "second"), streams, given, strict=True)
    there = {name: (stream, results) for name, stream, results in named if results[0] is not None}
    found = backward(shared, there, wanted) if there and wanted else {}
    return gradients_in_order(with_zeros(found, queries, shared, wanted), queries, shared, call.needs)
