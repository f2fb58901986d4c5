"""relative_attention in Triton; `_relative.py` launches the kernels, `_skew.py` draws the tile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert.launch.relative import gradients_in_order, relative_call, wanted_gradients

from ._configurations import refusal_of_heads
from ._relative import Stream


def supports(*tensors: Tensor | None) -> str | None:
    """CUDA tensors in float32, bfloat16 and float16, with head sizes that fit into a tile."""
    return refusal_of_heads("relative_fwd", *tensors)


def relative_attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32."""
    return Stream(*relative_call(call)).forward()


def relative_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, position_key, content_bias, position_bias, segment_bias, segment_embedding.

    Each has its tensor's shape and dtype, or is empty where its flag in `needs` is False.
    """
    shared, stream = relative_call(call)
    wanted = wanted_gradients((call.query,), shared, call.needs)
    found = Stream(shared, stream).backward(call.dout, call.out, call.lse, wanted) if wanted else {}
    return gradients_in_order(found, (call.query,), shared, call.needs)
