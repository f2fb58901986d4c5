"""Tensors whose memory ends, or begins, at a page that may not be touched: one byte too far ends the process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_PROT_NONE = 0
# `guarded` itself makes tensors while torch.empty is another.
_empty = torch.empty
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(x: Tensor, at_end: bool) -> Tensor:
    """A copy with x's strides, alone between two such pages; what is left of its own pages is NaN.

    Args:
        x: a tensor of the CPU; without elements it is given back as it is.
        at_end: the last element ends where the page behind begins, and not the first where the page before ends.
    """
    if x.numel() == 0:
        return x
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = extent * x.element_size()
    inner = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    first = PAGE + (inner - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=extent, offset=first)
    base = flat.data_ptr() - first
    ctypes.memset(base + PAGE, 0xFF, inner)
    for page in (base, base + PAGE + inner):
        if _libc.mprotect(page, PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    # No view, which autograd would treat in ways of its own.
    found = _empty(0, dtype=x.dtype).set_(flat.untyped_storage(), 0, x.shape, x.stride())
    values, there = x.detach(), found
    for dimension, stride in enumerate(x.stride()):
        if stride == 0:  # expanded: one place is all there is
            values, there = values.narrow(dimension, 0, 1), there.narrow(dimension, 0, 1)
    there.copy_(values)
    return found.requires_grad_(x.requires_grad) if x.is_floating_point() else found


def _makers(at_end: bool) -> list[tuple[Any, str, Callable[..., Tensor]]]:
    """What stands in for the functions by which Python asks torch for memory: owner, name, function."""

    def guard(function: Callable[..., Tensor], zeros: bool) -> Callable[..., Tensor]:
        def make(*arguments: Any, **options: Any) -> Tensor:
            found = function(*arguments, **options)
            if found.device.type != "cpu" or not found.is_contiguous():
                return found
            if found.is_floating_point() and not zeros:
                found.fill_(float("nan"))
            return guarded(found, at_end)

        return make

    def contiguous(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            found = function(x, *arguments, **options)
            return found if found.data_ptr() == x.data_ptr() else guarded(found, at_end)

        return make

    names = ((torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like"))
    methods = ((Tensor, name) for name in ("new_empty", "new_zeros"))
    return [
        *((owner, name, guard(getattr(owner, name), "zeros" in name)) for owner, name in (*names, *methods)),
        (Tensor, "contiguous", contiguous(Tensor.contiguous)),
    ]


_MAKERS = {at_end: _makers(at_end) for at_end in (False, True)}


@contextlib.contextmanager
def guarded_results(at_end: bool) -> Iterator[None]:
    """Inside the block what Python asks torch for, as results and copies, lies in such memory, full of NaN."""
    # What the class itself has; its methods of the base class are inherited again when ours are gone.
    makers, before = _MAKERS[at_end], []
    try:
        for owner, name, function in makers:
            before.append(vars(owner).get(name))
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name, _), function in zip(makers, before, strict=False):
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
