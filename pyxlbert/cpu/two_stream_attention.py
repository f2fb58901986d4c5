"""two_stream_attention through the native module: both streams in one call of the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._relative import backward, forward
from pyxlbert.cpu._tensors import refusal
from pyxlbert.launch.relative import two_stream_call

supports = refusal


def two_stream_attention_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_fwd`."""
    return forward(_C.cpu.two_stream_attention_fwd, *two_stream_call(call))


def two_stream_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.two_stream_attention.two_stream_attention_bwd`."""
    results = [(call.dcontent, call.content, call.content_lse), (call.dquery, call.query, call.query_lse)]
    return backward(_C.cpu.two_stream_attention_bwd, *two_stream_call(call), results, call.needs)
