"""Memory that is kept from step to step for copies and gradients of a parameter."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyxlbert.ops._torch import after_pass, backward_pass, held_by_autograd, transformed


class KeptMemory:
    """Memory for large tensors that are made in every step and gone before the next.

    The system gives memory of this size page by page, each filled with zeros at its first use, and takes all of it back
    when the tensor goes: that takes longer than filling the memory. Here it is lent again once nobody refers to the
    tensor or a view of it.
    """

    # Of one size: a gradient, and what is added to it.
    _MOST = 2
    # Bytes of a cache line, with which a tensor begins.
    _LINE = 64

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}
        self._handed: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # of a backward pass

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, with anything in it, which begins with a cache line."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size + self._LINE, dtype=np.uint8)
        start = -memory.ctypes.data % self._LINE
        lent = memory[start : start + size]  # kept by the tensor's storage, and finalised with it
        tensor = torch.from_numpy(lent).view(dtype).view(*shape)
        self._lent[tensor.data_ptr()] = weakref.ref(lent)
        weakref.finalize(lent, _give_back, free, memory).atexit = False
        return tensor

    def hand_over(self, gradient: Tensor) -> None:
        """Says that a backward function is about to return `gradient`, if it came from `empty`, for the parameter.

        Both this and `handed_over` are for functions that were given the parameter itself (`is_parameter`). A view of
        it has a gradient of its own, which may be asked for, or changed by a hook, before it is the parameter's.
        """
        lent, number = self._lent.get(gradient.data_ptr()), backward_pass()
        ours = lent is not None and lent() is not None and number >= 0
        # What becomes a parameter's `grad` is to have no weak reference: `torch.utils.swap_tensors` refuses those.
        if ours and after_pass(functools.partial(self._handed.pop, number, None)):
            self._handed[number] = gradient
        else:
            self._handed.pop(number, None)

    def handed_over(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """The gradient that was handed over in the backward pass that runs, while autograd waits for the rest of it.

        Autograd adds up what it gets for a parameter in a tensor of its own, unless there is one summand alone.  So
        whoever finds the first one here adds to it and returns nothing.  It is None if autograd has added another to it
        before, into a third tensor; the first is then gone, or a hook of its function keeps it.
        """
        gradient = self._handed.get(backward_pass())
        if gradient is None or gradient.shape != shape or gradient.dtype is not dtype or not held_by_autograd(gradient):
            return None
        return gradient.detach()


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < KeptMemory._MOST:
        free.append(memory)


def is_parameter(weight: Tensor) -> bool:
    """Whether autograd adds a gradient of `weight` to a parameter's without another function between."""
    return type(weight) is torch.nn.Parameter and weight.is_leaf


# By the parameter's id. Its storage is followed and not itself, for a tensor with a weak reference cannot be swapped
# with another, as `Module.to` does if it is told to. Another parameter of the same numbers has its own, in place of the
# first one's: that may be gone, which nobody tells, and its storage may live on and be many parameters one by one.
_kept: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, KeptMemory]] = {}


def _forget(key: int, storage: weakref.ref[torch.UntypedStorage]) -> None:
    if key in _kept and _kept[key][0] is storage:
        del _kept[key]


def memory_of(weight: Tensor) -> KeptMemory | None:
    """What is kept for copies and gradients of a parameter while its storage lives; None for one that is not
    on the CPU.

    Args:
        weight: a parameter of a model, or a view of one. What is no plain parameter, or is looked at by a compiler or a
            transform, has nothing.
    """
    if weight._is_view() and weight._base is not None:
        weight = weight._base
    if (
        type(weight) is not torch.nn.Parameter
        or not weight.is_cpu
        or weight.numel() == 0
        or torch.compiler.is_compiling()
        or transformed()
    ):
        return None
    storage, place, found = weight.untyped_storage(), weight.storage_offset(), _kept.get(id(weight))
    if found is None or found[0]() is not storage or found[1] != place:
        for key, (other, there, _) in list(_kept.items()):
            if there == place and other() is storage:
                _kept.pop(key, None)
        found = weakref.ref(storage, functools.partial(_forget, id(weight))), place, KeptMemory()
        _kept[id(weight)] = found
    return found[2]
