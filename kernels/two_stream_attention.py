"""two_stream_attention in Triton: both streams by the kernels of `_relative.py`, one after the other.

The query stream's rows are sorted by position.  What the streams share, keys, values, table and biases, gets the sum of
both streams' gradients, each computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.launch.relative import SHARED, gradients_in_order, two_stream_call, wanted_gradients, with_zeros

from ._relative import Stream
from .relative_attention import supports

__all__ = ["supports", "two_stream_attention_bwd", "two_stream_attention_fwd"]


def two_stream_attention_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """content `[B, T, H, D]`, its lse `[B, H, T]`, query `[B, M, H, D]`, its lse `[B, H, M]`."""
    shared, (content, query) = two_stream_call(call)
    return *Stream(shared, content).forward(), *Stream(shared, query).forward()


def two_stream_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """Gradients of content_query, query_query, key, value, position_key, content_bias, position_bias, segment_bias,
    segment_embedding; each empty where its flag in `needs` is False.

    An output without a gradient (None) adds nothing.
    """
    shared, streams = two_stream_call(call)
    given = ((call.dcontent, call.content, call.content_lse), (call.dquery, call.query, call.query_lse))
    both = call.dcontent is not None and call.dquery is not None
    queries = (call.content_query, call.query_query)
    wanted = wanted_gradients(queries, shared, call.needs)
    found: dict[str, Tensor] = {}
    for name, stream, (dout, out, lse) in zip(("query", "second"), streams, given, strict=True):
        own = wanted.intersection(SHARED) | ({"query"} if name in wanted else set())
        if dout is None or not own:
            continue
        gradients = Stream(shared, stream).backward(dout, out, lse, own, torch.float32 if both else None)
        if name in wanted:
            found[name] = gradients["query"]
        for common in wanted.intersection(SHARED):
            gradient = gradients[common]
            found[common] = found[common] + gradient if common in found else gradient
    return gradients_in_order(with_zeros(found, queries, shared, wanted), queries, shared, call.needs)
