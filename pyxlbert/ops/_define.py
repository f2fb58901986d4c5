"""How an op is registered: one schema per direction, the backend its last argument, one fake, one dispatcher.

`torch.library` definitions with an implementation key cost a third of `custom_op`; the backend is
resolved in plain Python outside the op and travels as a static string.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pyxlbert import backends, checks
from pyxlbert.backends import native
from pyxlbert.backends.choice import Choice
from pyxlbert.ops._torch import is_zerotensor, record_of, refuse_transforms, transformed, watched

_library = torch.library.Library("pyxlbert", "DEF")

# Exact types that cannot override dispatch; a subclass of Tensor may want to see the call.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))


_USUAL_BACKENDS = (None, "cpu")

# Arguments by name; see csrc/tensors.h.
Shapes = dict[str, str]


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

    def usual(self, *shapes: str, run: str | None = None) -> tuple[Callable[..., bool], Any]:
        """The short way of a public function to backend "cpu", which takes a third of the time of a small call.

        It is for plain tensors in the CPU's memory, in a thread where nobody watches and no gradient is to come.  One
        look then does for the tensors what the checks and `resolve` do.  Whatever is unusual is theirs, errors too.

        Args:
            shapes: of the tensors, as csrc/tensors.h reads them.
            run: the function of backend "cpu" that does it, if it is not the one that takes forward's record.

        Returns:
            What tells, from `backend=` and the tensors, whether a call may go this way; and that function.
        """
        if native._C is None:
            return lambda backend, *tensors: False, None
        look = functools.partial(native._C.usual, native._C.contract(list(enumerate(shapes))))
        default_backend = backends.default_backend

        def usual(backend: str | None, *tensors: Any) -> bool:
            return (
                not torch.compiler.is_compiling()
                and (
                    default_backend() in _USUAL_BACKENDS
                    if backend is None
                    else type(backend) is str and backend == "cpu"
                )
                and look(tensors)
            )

        return usual, getattr(self.module("cpu"), run or f"{self.name}_fwd")

    def refuse_transforms(self, *arguments: Any) -> None:
        """Rejects the transforms of torch.func that an argument takes part in: the first line of a public function.

        Otherwise a transform would be ignored (a tangent is then zero) or meet an error of the wrong thing.
        """
        if not torch.compiler.is_compiling() and transformed():
            refuse_transforms(self.name, arguments)

    def define(
        self,
        direction: str,
        schema: str,
        fake: Callable[[Any], Any],
        values: Callable[[Any], None] | None = None,
        *,
        shapes: Shapes,
        packed: Shapes | None = None,
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
            shapes: of the tensor arguments, as csrc/tensors.h reads them, for the last look before kernels read memory:
                a storage may be gone or another since the public function's checks, and `torch.ops` has none.
                "~" marks what forward has made and autograd alone has kept, or what is not read: nothing can have
                happened to it in a call that did not come through `torch.ops`.
            packed: the same where there are cu_seqlens.

        Returns:
            The record's class, and what runs a call: the overload, or in plain eager mode on the backends of kernels
            the implementation at once, which takes a third of the time of a small call.
        """
        function = f"{self.name}_{direction}"
        op = self

        class Implementations(dict[str, Callable[[Any], Any]]):
            def __missing__(self, backend: str) -> Callable[[Any], Any]:
                found = getattr(op.module(backend), function, None)
                if found is None:  # another package's: it may have no gradient
                    raise RuntimeError(
                        f"{op.name}: backend {backend!r} has no {function}; "
                        "use_backend(..., backward=...) names a backend that has"
                    )
                self[backend] = found
                return found

        implementations = Implementations()
        _library.define(f"{function}{schema}")
        overload = getattr(torch.ops.pyxlbert, function).default
        record, tensors = record_of(overload, "".join(part.capitalize() for part in function.split("_")))
        misfit = _looks(function, record, tensors, shapes, packed)
        # The public function has checked the shapes of a call that comes straight from it.
        plain = _plain_looks(function, record, tensors, *(({}, None) if direction == "fwd" else (shapes, packed)))

        def checked(call: Any) -> None:
            place = misfit(call)
            if place >= 0:
                wanted = shapes if packed is None or call.cu_seqlens is None else packed
                raise ValueError(f"{function}: {_misfit(call, place, wanted, tensors)}")
            if call.backend == "torch":
                return
            # The public function has asked this; `torch.ops` has not, and kernels take dtypes by their size.
            if call.backend not in backends.NAMES:
                raise ValueError(
                    f"{function}: backend: got {call.backend!r}, wanted one of {', '.join(backends.NAMES)}"
                )
            floats = (call[place] for place in tensors if call[place] is not None)
            reason = op.refusal(call.backend, next(x for x in floats if x.is_floating_point()))
            if reason is not None:
                raise RuntimeError(f"{function}: backend {call.backend!r} is unavailable: {reason}")

        def runner(device: str | None, look: Callable[[Any], None] | None = checked) -> Callable[[Any], Any]:
            def run(call: Any) -> Any:
                if look is not None:
                    look(call)
                if values is not None and (device == "cpu" or backends.checking()):
                    values(call)
                here = device or next(x.device.type for x in call if isinstance(x, torch.Tensor))
                if torch.is_autocast_enabled(here):
                    # The op's dtypes are settled: a product inside an implementation is not to be cast again.
                    with torch.autocast(here, enabled=False):
                        return implementations[call.backend](call)
                return implementations[call.backend](call)

            return run

        # Any other device has backend "torch", which runs wherever torch does, and what other packages bring.
        runners = {"CPU": runner("cpu"), "CUDA": runner("cuda"), "CompositeExplicitAutograd": runner(None)}
        self.records[direction] = record
        self.runners[direction] = {key: _unpacked(run, record) for key, run in runners.items()}
        for key, run in self.runners[direction].items():
            _library.impl(function, run, key)
        torch.library.register_fake(f"pyxlbert::{function}", _unpacked(fake, record), lib=_library)
        on_cpu, on_cuda = runner("cpu", None), runner("cuda", None)

        def run_call(call: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or call.backend == "torch"
                or not _PLAIN.issuperset(map(type, call))
                or watched()
                # Lazy negation or zeros, which the dispatcher materialises, or what the check behind it refuses.
                or plain(call) >= 0
            ):
                return overload(*call)
            if call.backend == "cpu":
                return on_cpu(call)
            first = next(x for x in call if x is not None)
            if first.is_cpu:
                return on_cpu(call)
            return on_cuda(call) if first.is_cuda else overload(*call)

        return record, run_call


def _looks(
    function: str, record: Any, tensors: tuple[int, ...], shapes: Shapes, packed: Shapes | None, prefix: str = ""
) -> Callable[[Any], int]:
    """`misfit` of csrc/tensors.h for a call: -1 where all is well."""
    names = record._fields
    unknown = (shapes.keys() | (packed or {}).keys()) - {names[place] for place in tensors}
    if unknown:
        raise ValueError(f"{function}: shapes: got {', '.join(unknown)}, wanted tensors of the schema")
    if native._C is None:
        return lambda call: -1

    def look_for(wanted: Shapes) -> Callable[[Any], int]:
        rules = [(place, prefix + wanted.get(names[place], "")) for place in tensors]
        if prefix:
            rules = [(place, shape) for place, shape in rules if "~" not in shape]
        rules = [(place, shape.replace("~", "")) for place, shape in rules]
        return functools.partial(native._C.misfit, native._C.contract(rules))

    usual = look_for(shapes)
    if packed is None:
        return usual
    in_rows = look_for(packed)
    return lambda call: usual(call) if call.cu_seqlens is None else in_rows(call)


def _plain_looks(
    function: str, record: Any, tensors: tuple[int, ...], shapes: Shapes, packed: Shapes | None
) -> Callable[[Any], int]:
    """The same, and not -1 either for a tensor that is lazily negated or zero."""
    if native._C is not None:
        return _looks(function, record, tensors, shapes, packed, prefix="-")

    def look(call: Any) -> int:
        found = (n for n in tensors if call[n] is not None and (call[n].is_neg() or is_zerotensor(call[n])))
        return next(found, -1)

    return look


def _misfit(call: Any, found: int, wanted: Shapes, tensors: tuple[int, ...]) -> str:
    """What is wrong with the argument at half of `found`, as `misfit` says it."""
    place, shape = divmod(found, 2)
    name, x = call._fields[place], call[place]
    if not shape:
        return f"{name}: {checks.short_storage(x)}"
    others = [
        f"{call._fields[n]} {checks.describe(call[n])} ({_letters(wanted[call._fields[n]])})"
        for n in tensors
        if n != place and call[n] is not None and call._fields[n] in wanted
    ]
    return f"{name}: got {checks.describe(x)}, wanted {_letters(wanted[name])} beside {', '.join(others)}"


def _letters(shape: str) -> str:
    """ "[..., N]" of "=*N"."""
    kinds = {"4": "float32 ", "8": "int64 ", "1": "bool "}
    kind = "".join(kinds.get(sign, "") for sign in shape) + ("contiguous " if "|" in shape else "")
    dimensions = ["..." if sign in "*?" else "2" if sign == "Z" else sign for sign in shape if sign not in "~=|148"]
    return f"{kind}[{', '.join(dimensions)}]"


def _unpacked(function: Callable[[Any], Any], record: Any) -> Callable[..., Any]:
    """`function` of a call as torch calls it: with the schema's arguments."""

    def run(*arguments: Any) -> Any:
        return function(record(*arguments))

    return run
