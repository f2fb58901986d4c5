"""two_stream_attention through the CUDA kernels: tensors to addresses and strides, both streams in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.cuda._attention import refusal_of_heads
from pyxlbert.cuda._relative import backward, forward
from pyxlbert.launch.relative import gradients_in_order, two_stream_call, with_zeros

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
    there = [n for n in (0, 1) if given[n][0] is not None]
    queries = (call.content_query, call.query_query)
    found = {name: torch.zeros_like(x) for name, x in zip(("query", "second"), queries, strict=True)}
    if there:
        own, common = backward(shared, [streams[n] for n in there], [given[n] for n in there])
        for n, gradient in zip(there, own, strict=True):
            found[("query", "second")[n]] = gradient
        found |= common
    return gradients_in_order(with_zeros(found, shared), queries, shared, call.needs)
