"""relative_attention through the CUDA kernels: tensors to addresses and strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert.cuda._attention import refusal_of_heads
from pyxlbert.cuda._relative import backward, forward
from pyxlbert.launch.relative import gradients_in_order, relative_call, wanted_gradients

supports = refusal_of_heads


def relative_attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.relative_attention.relative_attention_fwd`."""
    shared, stream = relative_call(call)
    return forward("relative_attention", shared, [stream])[0]


def relative_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.relative_attention.relative_attention_bwd`."""
    shared, stream = relative_call(call)
    wanted = wanted_gradients((call.query,), shared, call.needs)
    given = {"query": (stream, (call.dout, call.out, call.lse))}
    found = backward(shared, given, wanted) if wanted else {}
    return gradients_in_order(found, (call.query,), shared, call.needs)
