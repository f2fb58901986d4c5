"""Rows of a word table; and memory that is kept from step to step for copies and gradients of its size."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.ops._autograd import OpFunction, single_backward
from pyxlbert.ops._torch import apply, transformed


class KeptMemory:
    """Memory for large tensors that are made in every step and gone before the next.

    The system gives memory of this size page by page, each filled with zeros at its first use, and takes all of it back
    when the tensor goes: that takes longer than filling the memory. Here it is lent again once nobody refers to the
    tensor or a view of it.
    """

    # Of one size: a gradient, and what is added to it.
    _MOST = 2

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, with anything in it."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, dtype=np.uint8)
        lent = memory[:]  # kept by the tensor's storage, and finalised with it
        weakref.finalize(lent, _give_back, free, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < KeptMemory._MOST:
        free.append(memory)


_kept: dict[int, KeptMemory] = {}


def memory_of(weight: Tensor) -> KeptMemory | None:
    """What is kept for copies and gradients of a parameter while it lives; None for one that is not on the CPU.

    Args:
        weight: a parameter of a model. What is no plain parameter, or is looked at by a compiler or a transform, has
            nothing.
    """
    if (
        type(weight) is not torch.nn.Parameter
        or not weight.is_cpu
        or weight.numel() == 0
        or torch.compiler.is_compiling()
        or transformed()
    ):
        return None
    found = _kept.get(id(weight))
    if found is None:
        found = _kept[id(weight)] = KeptMemory()
        weakref.finalize(weight, _kept.pop, id(weight), None).atexit = False
    return found


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
        dweight = ctx.memory.empty(ctx.shape, dy.dtype).zero_()
        return dweight.index_add_(0, ids.reshape(-1), dy.reshape(-1, ctx.shape[1])), None, None


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
