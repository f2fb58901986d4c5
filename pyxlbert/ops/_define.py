"""How an op is registered: one schema per direction, the backend its last argument, one fake, one dispatcher.

`torch.library` definitions with an implementation key cost a third of `custom_op`; the backend is
resolved in plain Python outside the op and travels as a static string.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from pyxlbert import backends

_library = torch.library.Library("pyxlbert", "DEF")

OPS: dict[str, Op] = {}

# Types of arguments in which nobody but the implementation has a say; a subclass of Tensor may want to see the call.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))


class Op:
    """One name, its backends and its two directions.

    Args:
        name: the op's name on every floor.
        implementations: module path per backend; the module holds `<name>_fwd`, `<name>_bwd` with the
            schema's arguments less the backend, and `supports(*tensors) -> None | sentence`.
    """

    def __init__(self, name: str, implementations: dict[str, str]) -> None:
        self.name = name
        self.implementations = implementations
        self._modules: dict[str, ModuleType] = {}
        for backend in ("torch", "cpu"):
            if backend in implementations and backends.unavailable(backend) is None:
                self._module(backend)
        self._native = self._modules["cpu"].supports if "cpu" in self._modules else None
        OPS[name] = self

    def define(
        self, direction: str, schema: str, fake: Callable[..., Any], values: Callable[..., None] | None = None
    ) -> Callable[..., Any]:
        """Registers `pyxlbert::<name>_<direction>` and returns what to call: the overload, or in plain eager mode on
        backend "cpu" the implementation at once, which takes a third of the time of a small call.

        Args:
            direction: "fwd" or "bwd".
            schema: arguments and returns, the last argument `str backend`.
            fake: shapes and dtypes of the results, with the same arguments.
            values: raises where only the values of the tensors tell (ids, lengths); called with the
                schema's arguments less the backend before an implementation runs, on CPU tensors.
        """
        function = f"{self.name}_{direction}"
        op = self

        class Implementations(dict[str, Callable[..., Any]]):
            def __missing__(self, backend: str) -> Callable[..., Any]:
                self[backend] = getattr(op._module(backend), function)
                return self[backend]

        implementations = Implementations()

        def runner(device: str) -> Callable[..., Any]:
            check = values if device == "cpu" else None

            def run(*arguments: Any) -> Any:
                if check is not None:
                    check(*arguments[:-1])
                if torch.is_autocast_enabled(device):
                    # The op's dtypes are settled: a product inside an implementation is not to be cast again.
                    with torch.autocast(device, enabled=False):
                        return implementations[arguments[-1]](*arguments[:-1])
                return implementations[arguments[-1]](*arguments[:-1])

            return run

        _library.define(f"{function}{schema}")
        runners = {key: runner(key.lower()) for key in ("CPU", "CUDA")}
        for key, run in runners.items():
            _library.impl(function, run, key)
        torch.library.register_fake(f"pyxlbert::{function}", fake, lib=_library)
        overload, at_once = getattr(torch.ops.pyxlbert, function).default, runners["CPU"]

        def call(*arguments: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or arguments[-1] != "cpu"
                or not _PLAIN.issuperset(map(type, arguments))
                or watched()
            ):
                return overload(*arguments)
            return at_once(*arguments)

        return call

    def resolve(self, backend: str | None, *tensors: torch.Tensor | None) -> str:
        """The backend to run: the named one, the default of `use_backend`, or the first that supports the tensors.

        Args:
            backend: what the caller named, or None.
            tensors: the ones that decide, checked before to be on one device; a parameter that must have
                x's dtype or float32 need not be here.

        Raises:
            ValueError: the name is unknown.
            RuntimeError: the named backend is not here, or does not take these inputs.
        """
        asked = backend if backend is not None else backends.default_backend()
        if asked is None:
            # The usual call first, without a look at the tables.
            native = self._native
            if native is not None and tensors[0].is_cpu and native(*tensors) is None:  # type: ignore[union-attr]
                return "cpu"
            for name in backends.PREFERENCE.get(tensors[0].device.type, ("torch",)):  # type: ignore[union-attr]
                if self.refusal(name, *tensors) is None:
                    return name
            raise RuntimeError(f"{self.name}: no backend takes these inputs:\n{self.explain(*tensors)}")
        reason = self.refusal(asked, *tensors)
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {asked!r} is unavailable: {reason}")
        return asked

    def refusal(self, backend: str, *tensors: torch.Tensor | None) -> str | None:
        """Why `backend` cannot run this op on these tensors, or None."""
        module = self._modules.get(backend)
        if module is None:
            reason = backends.unavailable(backend)
            if reason is not None:
                return reason
            if backend not in self.implementations:
                return f"{self.name} has no {backend} kernel"
            module = self._module(backend)
        return module.supports(*tensors)

    def explain(self, *tensors: torch.Tensor | None) -> str:
        """One line per backend: taken, possible, or why not."""
        device = tensors[0].device.type if tensors else "cpu"  # type: ignore[union-attr]
        order = backends.PREFERENCE.get(device, ("torch",))
        lines, taken = [f"{self.name} on {device}:"], False
        for name in (*order, *(name for name in backends.NAMES if name not in order)):
            reason = self.refusal(name, *tensors)
            if reason is None and name not in order:
                reason = f"not for {device} tensors"
            if reason is None and not taken:
                lines.append(f"  {name}: taken")
                taken = True
            else:
                lines.append(f"  {name}: {reason or 'possible'}")
        return "\n".join(lines)

    def _module(self, backend: str) -> ModuleType:
        if backend not in self._modules:
            self._modules[backend] = importlib.import_module(self.implementations[backend])
        return self._modules[backend]


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
