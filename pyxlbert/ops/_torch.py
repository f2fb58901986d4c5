"""Every private name of torch that the ops lean on, each with what happens where torch has moved it.

tests/ops/test_torch.py says which one has moved.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from pyxlbert.backends import native


def _intercepted() -> bool:
    """Whether a mode, a transform or a tracer takes part in the calls of this thread that go through torch."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _watched() -> bool:
    """The same, or a profiler sees them."""
    return _intercepted() or torch._C._autograd._profiler_enabled()


def _always() -> bool:
    return True


def _differentiates_forwards() -> bool:
    return forward_ad._current_level >= 0


try:
    _watched()
    watched, intercepted = _watched, _intercepted
except AttributeError:
    # If torch no longer has the names that tell, every call goes through it.
    watched = intercepted = _always


def _transformed() -> bool:
    """Whether this thread is inside a transform of torch.func or a level of forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _never() -> bool:
    return False


try:
    _transformed()
    transformed = _transformed
except AttributeError:
    transformed = _never


def _watchers() -> tuple[Callable[[], Any], ...]:
    """What `_watched` and `_transformed` ask, each a function without arguments, and whether autocast is on."""
    if watched is _always or transformed is _never:
        return (_always,)
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        torch._C._autograd._profiler_enabled,
        _differentiates_forwards,
        functools.partial(torch.is_autocast_enabled, "cpu"),
    )


if native._C is not None:
    native._C.watch((torch.Tensor, torch.nn.Parameter), torch.is_grad_enabled, _watchers())


def refuse_transforms(op: str, arguments: tuple[Any, ...]) -> None:
    """Raises what the op cannot do for a transform that one of the arguments takes part in."""
    for x in arguments:
        if not isinstance(x, torch.Tensor):
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{op}: forward-mode differentiation (jvp) is not supported; ask for gradients by backward()"
            )
        if torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError(f"{op}: vmap is not supported; give the op the batch dimension instead")
        if torch._C._functorch.is_gradtrackingtensor(x):
            raise RuntimeError(
                f"{op}: torch.func.grad and vjp are not supported; use torch.autograd.grad or backward()"
            )


def _no_pass() -> int:
    return -1


# The number of the backward pass that runs in this thread, -1 outside of one.  Where torch no longer tells there is
# none, and nothing is added to a gradient that another function has made.
backward_pass: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", _no_pass)


def after_pass(call: Callable[[], Any]) -> bool:
    """Has `call` called when the backward pass that runs in this thread has ended well; False where torch cannot."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    queue = getattr(engine, "queue_callback", None)
    if queue is None:
        return False
    queue(call)
    return True


def keeps_graph() -> bool:
    """Whether the backward pass that runs may be asked for again: then nothing that forward kept may change."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def held_by_autograd(x: torch.Tensor) -> bool:
    """Whether C++ refers to x besides Python. Where torch no longer counts: False."""
    count = getattr(x, "_use_count", None)
    # What is handed through C++ belongs to Python, which counts as one, however many of its objects refer to x.
    return count is not None and x.requires_grad_(False) is x and count() > 1


def is_zerotensor(x: torch.Tensor) -> bool:
    """Whether x is zeros without memory, as autograd makes them."""
    return x._is_zerotensor()


def in_memory(x: torch.Tensor) -> torch.Tensor:
    """x, for whoever reads memory itself: not zeros without memory, and not numbers that lie there negated."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if is_zerotensor(x) else x.resolve_neg()


def record_of(overload: Any, name: str) -> tuple[Any, tuple[int, ...]]:
    """A NamedTuple class of an overload's arguments, and the places of its tensors, those that may be None too."""
    arguments = overload._schema.arguments
    tensor = torch._C.OptionalType(torch._C.TensorType.get())
    places = tuple(place for place, one in enumerate(arguments) if one.type.isSubtypeOf(tensor))
    return namedtuple(name, [one.name for one in arguments]), places


# Whether a functorch transform is active; None where torch no longer has the name.
transforming: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, all of them positional.

    `apply` inspects the signature of `forward` on every call, which takes ten times as long as a small kernel.
    In eager mode without functorch transforms the base class does the rest; if torch no longer has the name that
    tells so, `apply` is called as it is.
    """
    if transforming is None or torch.compiler.is_compiling() or transforming():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
