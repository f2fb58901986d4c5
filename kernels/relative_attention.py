"""relative_attention in Triton; `_relative.py` has the kernels and draws the tile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxlbert.launch.relative import gradients_in_order, relative_call

from ._configurations import most_head_size
from ._launch import refusal
from ._relative import Stream

_MOST_HEAD_SIZE = most_head_size("relative_fwd")


def supports(*tensors: Tensor | None) -> str | None:
    """CUDA tensors in float32, bfloat16 and float16, with head sizes that fit into a tile."""
    head_size = tensors[0].shape[-1] if tensors and tensors[0] is not None and tensors[0].dim() else 0
    if head_size > _MOST_HEAD_SIZE:
        return f"it takes head sizes of at most {_MOST_HEAD_SIZE}, not {head_size}"
    return refusal(*tensors)


def relative_attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32."""
    return Stream(*relative_call(call)).forward()


def relative_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, position_key, content_bias, position_bias, segment_bias, segment_embedding.

    Each has its tensor's shape and dtype, or is empty where its flag in `needs` is False.
    """
    shared, stream = relative_call(call)
    found = Stream(shared, stream).backward(call.dout, call.out, call.lse)
    return gradients_in_order(found, (call.query,), shared, call.needs)
