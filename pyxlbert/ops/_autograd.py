"""What the ops' gradient rules share: errors that name the op, and a call kept from forward to backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pyxlbert import backends


class OpFunction(torch.autograd.Function):
    """Base of the ops' autograd rules.  A subclass sets `op`; what it cannot do is an error that names the op."""

    op = "this op"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def refuse(*_: Any) -> None:
            raise RuntimeError(f"{cls.op}: vmap is not supported; give the op the batch dimension instead")

        cls.vmap = staticmethod(refuse)


def backward_backend(backend: str) -> str:
    """The backend of the backward pass of an op whose forward runs on `backend`."""
    return backends.default_backward() or backend


def single_backward(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a backward that has no derivative of its own: differentiating it raises an error naming the op."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{op}: double backward is not supported (create_graph=True)")
            return backward(ctx, *gradients)

        return run

    return decorate


def keep(ctx: Any, call: Any, *results: torch.Tensor) -> None:
    """Keeps for backward some results of forward and its call: tensors as autograd wants them, the rest as it is."""
    ctx.set_materialize_grads(False)
    ctx.results = len(results)
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in call]
    ctx.save_for_backward(*results, *(x if isinstance(x, torch.Tensor) else None for x in call))


def kept(ctx: Any, record: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
    """What `keep` kept: the results, and the call, whose class is `record`."""
    saved = ctx.saved_tensors
    fields = [x if x is not None else other for x, other in zip(saved[ctx.results :], ctx.others, strict=True)]
    return saved[: ctx.results], record(*fields)
