"""How an op is registered: one schema per direction, the backend its last argument, one fake, one dispatcher.

`torch.library` definitions with an implementation key cost a third of `custom_op`; the backend is
resolved in plain Python outside the op and travels as a static string.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from pyxlbert import backends
from pyxlbert.backends.choice import Choice

_library = torch.library.Library("pyxlbert", "DEF")

# Types of arguments in which nobody but the implementation has a say; a subclass of Tensor may want to see the call.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))

_OPTIONAL_TENSOR = torch._C.OptionalType(torch._C.TensorType.get())


class Op(Choice):
    """One name, its backends and its two directions.

    Args:
        name: the op's name on every floor.
        backends: the names of the backends that have it.
        ids_first: the first argument holds ids, which do not decide the backend.
    """

    def __init__(self, name: str, backends: tuple[str, ...], *, ids_first: bool = False) -> None:
        super().__init__(name, backends, ids_first=ids_first)
        # What torch calls, by direction and dispatch key.
        self.runners: dict[str, dict[str, Callable[..., Any]]] = {}

    def public(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Marks the op's public function: what torch.func asks of it and it cannot do is refused before anything else.

        Without that, a transform would be ignored (a tangent is then zero) or meet an error of the wrong thing.
        """

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not torch.compiler.is_compiling() and transformed():
                _refuse_transforms(self.name, (*arguments, *options.values()))
            return function(*arguments, **options)

        return call

    def define(
        self, direction: str, schema: str, fake: Callable[..., Any], values: Callable[..., None] | None = None
    ) -> Callable[..., Any]:
        """Registers `pyxlbert::<name>_<direction>` and returns what to call: the overload, or in plain eager mode on
        the backends of kernels the implementation at once, which takes a third of the time of a small call.

        Args:
            direction: "fwd" or "bwd".
            schema: arguments and returns, the last argument `str backend`.
            fake: shapes and dtypes of the results, with the same arguments.
            values: raises where only the values of the tensors tell (ids, lengths); called with the
                schema's arguments less the backend before an implementation runs, on CPU tensors and inside
                `debug_checks` on all.
        """
        function = f"{self.name}_{direction}"
        op = self

        class Implementations(dict[str, Callable[..., Any]]):
            def __missing__(self, backend: str) -> Callable[..., Any]:
                self[backend] = getattr(op.module(backend), function)
                return self[backend]

        implementations = Implementations()

        def runner(device: str | None) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                if values is not None and (device == "cpu" or backends.checking()):
                    values(*arguments[:-1])
                here = device or next(x.device.type for x in arguments if isinstance(x, torch.Tensor))
                if torch.is_autocast_enabled(here):
                    # The op's dtypes are settled: a product inside an implementation is not to be cast again.
                    with torch.autocast(here, enabled=False):
                        return implementations[arguments[-1]](*arguments[:-1])
                return implementations[arguments[-1]](*arguments[:-1])

            return run

        _library.define(f"{function}{schema}")
        # Any other device has backend "torch" alone, which runs wherever torch does.
        runners = {"CPU": runner("cpu"), "CUDA": runner("cuda"), "CompositeExplicitAutograd": runner(None)}
        for key, run in runners.items():
            _library.impl(function, run, key)
        torch.library.register_fake(f"pyxlbert::{function}", fake, lib=_library)
        self.runners[direction] = runners
        overload, on_cpu, on_cuda = getattr(torch.ops.pyxlbert, function).default, runners["CPU"], runners["CUDA"]
        tensors = tuple(
            place for place, one in enumerate(overload._schema.arguments) if one.type.isSubtypeOf(_OPTIONAL_TENSOR)
        )

        def call(*arguments: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or arguments[-1] == "torch"
                or not _PLAIN.issuperset(map(type, arguments))
                or watched()
            ):
                return overload(*arguments)
            for place in tensors:
                x = arguments[place]
                # Where the values in memory are not the tensor's, the dispatcher sees to that.
                if x is not None and (x.is_neg() or x._is_zerotensor()):
                    return overload(*arguments)
            if arguments[-1] == "cpu" or next(x for x in arguments if x is not None).is_cpu:
                return on_cpu(*arguments)
            return on_cuda(*arguments)

        return call


def _watched() -> bool:
    """Whether a mode, a transform, a tracer or a profiler sees the calls of this thread that go through torch."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _always() -> bool:
    return True


try:
    _watched()
    watched = _watched
except AttributeError:
    # Where torch no longer has the names that tell, every call goes through it.
    watched = _always


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


def _refuse_transforms(op: str, arguments: tuple[Any, ...]) -> None:
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


class OpFunction(torch.autograd.Function):
    """Base of the ops' autograd rules.  A subclass sets `op`; what it cannot do is an error that names the op."""

    op = "this op"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def refuse(*_: Any) -> None:
            raise RuntimeError(f"{cls.op}: vmap is not supported; give the op the batch dimension instead")

        cls.vmap = staticmethod(refuse)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, all of them positional.

    `apply` inspects the signature of `forward` on every call, which takes ten times as long as a small kernel.
    In eager mode without functorch transforms the base class does the rest; where torch no longer has the
    name that tells so, `apply` is called as it is.
    """
    if _transforming is None or torch.compiler.is_compiling() or _transforming():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


_transforming: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)


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
