"""Rows of a word table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.ops._autograd import OpFunction, single_backward
from pyxlbert.ops._memory import KeptMemory, memory_of
from pyxlbert.ops._torch import apply


class _Words(OpFunction):
    op = "embedding"

    @staticmethod
    def forward(weight: Tensor, ids: Tensor, memory: KeptMemory) -> Tensor:
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ids, ctx.memory = inputs
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)

    @staticmethod
    @single_backward("embedding")
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if dy is None:
            return None, None, None
        (ids,) = ctx.saved_tensors
        found = (ids.reshape(-1), dy.reshape(-1, ctx.shape[1]))
        # Of a table that is the decoder too, the decoder's gradient is there already, and autograd would add the two in
        # fresh memory.
        other = ctx.memory.handed_over(ctx.shape, dy.dtype)
        if other is not None:
            other.index_add_(0, *found)
            return None, None, None
        return ctx.memory.empty(ctx.shape, dy.dtype).zero_().index_add_(0, *found), None, None


def words_of(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table, as `torch.nn.functional.embedding` gives them.

    Args:
        ids: int32 or int64 ``[...]``.
        weight: ``[V, E]``.

    Returns:
        ``[..., E]`` in weight's dtype.
    """
    # A sum of many rows in a narrow dtype is left to torch.
    trains = torch.is_grad_enabled() and weight.requires_grad and weight.dtype in (torch.float32, torch.float64)
    memory = memory_of(weight) if trains else None
    return F.embedding(ids, weight) if memory is None else apply(_Words, weight, ids, memory)
