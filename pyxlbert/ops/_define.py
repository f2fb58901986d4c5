"""How an op is registered: one schema per direction, the backend its last argument, one fake, one dispatcher.

`torch.library` definitions with an implementation key cost a third of `custom_op`; the backend is
resolved in plain Python outside the op and travels as a static string.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pyxlbert import backends
from pyxlbert.backends.choice import Choice
from pyxlbert.ops._torch import is_zerotensor, record_of, refuse_transforms, transformed, watched

_library = torch.library.Library("pyxlbert", "DEF")

# Exact types that cannot override dispatch; a subclass of Tensor may want to see the call.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))


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
        # The class of a call, by direction.
        self.records: dict[str, Any] = {}

    def public(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Marks the op's public function: unsupported torch.func transforms are rejected before the op runs.

        Otherwise a transform would be ignored (a tangent is then zero) or meet an error of the wrong thing.
        """

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not torch.compiler.is_compiling() and transformed():
                refuse_transforms(self.name, (*arguments, *options.values()))
            return function(*arguments, **options)

        return call

    def define(
        self, direction: str, schema: str, fake: Callable[[Any], Any], values: Callable[[Any], None] | None = None
    ) -> tuple[Any, Callable[[Any], Any]]:
        """Registers `pyxlbert::<name>_<direction>`.

        A call is one record: a NamedTuple of the schema's arguments.  Fakes, checks of values and implementations take
        it as it is.

        Args:
            direction: "fwd" or "bwd".
            schema: arguments and returns, the last argument `str backend`.
            fake: shapes and dtypes of the results for a call.
            values: raises if only the values of the tensors tell (ids, lengths) that a call is wrong; runs before an
                implementation, on CPU tensors and inside `debug_checks` on all.

        Returns:
            The record's class, and what runs a call: the overload, or in plain eager mode on the backends of kernels
            the implementation at once, which takes a third of the time of a small call.
        """
        function = f"{self.name}_{direction}"
        op = self

        class Implementations(dict[str, Callable[[Any], Any]]):
            def __missing__(self, backend: str) -> Callable[[Any], Any]:
                self[backend] = getattr(op.module(backend), function)
                return self[backend]

        implementations = Implementations()
        _library.define(f"{function}{schema}")
        overload = getattr(torch.ops.pyxlbert, function).default
        record, tensors = record_of(overload, "".join(part.capitalize() for part in function.split("_")))

        def runner(device: str | None) -> Callable[[Any], Any]:
            def run(call: Any) -> Any:
                if values is not None and (device == "cpu" or backends.checking()):
                    values(call)
                here = device or next(x.device.type for x in call if isinstance(x, torch.Tensor))
                if torch.is_autocast_enabled(here):
                    # The op's dtypes are settled: a product inside an implementation is not to be cast again.
                    with torch.autocast(here, enabled=False):
                        return implementations[call.backend](call)
                return implementations[call.backend](call)

            return run

        # Any other device has backend "torch" alone, which runs wherever torch does.
        runners = {"CPU": runner("cpu"), "CUDA": runner("cuda"), "CompositeExplicitAutograd": runner(None)}
        self.records[direction] = record
        self.runners[direction] = {key: _unpacked(run, record) for key, run in runners.items()}
        for key, run in self.runners[direction].items():
            _library.impl(function, run, key)
        torch.library.register_fake(f"pyxlbert::{function}", _unpacked(fake, record), lib=_library)
        on_cpu, on_cuda = runners["CPU"], runners["CUDA"]

        def run_call(call: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or call.backend == "torch"
                or not _PLAIN.issuperset(map(type, call))
                or watched()
            ):
                return overload(*call)
            for place in tensors:
                x = call[place]
                # Lazy negation or zeros: the dispatcher materialises them.
                if x is not None and (x.is_neg() or is_zerotensor(x)):
                    return overload(*call)
            if call.backend == "cpu" or next(x for x in call if x is not None).is_cpu:
                return on_cpu(call)
            return on_cuda(call)

        return record, run_call


def _unpacked(function: Callable[[Any], Any], record: Any) -> Callable[..., Any]:
    """`function` of a call as torch calls it: with the schema's arguments."""

    def run(*arguments: Any) -> Any:
        return function(record(*arguments))

    return run
