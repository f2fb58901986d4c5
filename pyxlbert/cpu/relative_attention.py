"""relative_attention through the native module: tensors to addresses and strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._relative import backward, forward
from pyxlbert.cpu._tensors import refusal
from pyxlbert.launch.relative import relative_call

supports = refusal


def relative_attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.relative_attention.relative_attention_fwd`."""
    shared, stream = relative_call(call)
    return forward(_C.cpu.relative_attention_fwd, shared, [stream])


def relative_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """See `pyxlbert.reference.relative_attention.relative_attention_bwd`."""
    shared, stream = relative_call(call)
    results = [(call.dout, call.out, call.lse)]
    return backward(_C.cpu.relative_attention_bwd, shared, [stream], results, call.needs)
