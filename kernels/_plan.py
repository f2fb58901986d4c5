"""Launches that are remembered: of a call like an earlier one only the addresses are new.

Triton looks at every argument of every launch, which for attention takes longer than all else on the host.  What a
forward kernel is given follows from its tensors' dtypes, shapes, strides and alignments and from the options: by these
the compiled kernel and its numbers are kept, and the next call puts its tensors into their places.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._launch import INTERPRETED

# Before 3.3 a compiled kernel was launched without its constants; AMD's compiler looks at the size of a tensor too.
POSSIBLE = (
    not INTERPRETED
    and torch.version.hip is None
    and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
)
MOST = 4096

_plans: dict[Hashable, Plans] = {}


class Launch(NamedTuple):
    """A launch as it was made: the kernel, what came of it, its grid, its arguments, its constants and options."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def given(self) -> list[Any]:
        """All that the kernel was given, in the order of its signature, constants too."""
        names = self.kernel.arg_names[len(self.arguments) :]
        return [*self.arguments, *(self.constants[name] for name in names)]


class Plan:
    """A compiled kernel, its grid, and its arguments but for the tensors of a call.

    Args:
        compiled: what the first launch returned.
        grid: of it.
        arguments: all of them, in the order of the kernel's signature, constants too; records hold records.
        tensors: of the first launch, by their place among a call's.
    """

    def __init__(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any], tensors: dict[int, int]) -> None:
        self.compiled, self.grid = compiled, (*grid, 1, 1)[:3]
        # Records of records of some forty fields: a function that was written for them is put together in a third of
        # the time of a walk through them.  Records become plain tuples, which is all that a launch asks for.
        constants: dict[str, Any] = {}
        source = "".join(f"{_source(argument, tensors, constants)}, " for argument in arguments)
        self.filled = eval(f"lambda t: ({source})", constants)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        self.compiled[self.grid](*self.filled(tensors))


class Plans(NamedTuple):
    """The launches of a call, one after the other, and the shapes of what they leave to each other in float32."""

    launches: tuple[Plan, ...]
    scratch: tuple[torch.Size, ...]

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        if self.scratch:
            first = tensors[0]
            tensors += tuple(first.new_empty(shape, dtype=torch.float32) for shape in self.scratch)
        for launch in self.launches:
            launch(tensors)


def _source(argument: Any, tensors: dict[int, int], constants: dict[str, Any]) -> str:
    """The expression of an argument, given the tensors t of a call; what else it needs goes to the constants."""
    if isinstance(argument, Tensor):
        return f"t[{tensors[id(argument)]}]"
    if isinstance(argument, tuple) and any(True for _ in tensors_in(argument)):
        return "(" + "".join(f"{_source(x, tensors, constants)}, " for x in argument) + ")"
    name = f"c{len(constants)}"
    constants[name] = argument
    return name


def tensors_in(argument: Any) -> Iterator[Tensor]:
    """The tensors of an argument: itself, or those of a record and of the records in it."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for x in argument:
            yield from tensors_in(x)


def kind_of(device: int, tensors: tuple[Tensor | None, ...], *options: Hashable) -> Hashable:
    """What a launch depends on, beside the addresses: a key."""
    return (
        device,
        options,
        *(None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() & 15) for x in tensors),
    )


def run(kind: Hashable, device: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Launches what is remembered for this kind; False where nothing is."""
    plan = _plans.get(kind)
    if plan is None:
        return False
    if device == torch.cuda.current_device():
        plan(tensors)
    else:
        with torch.cuda.device(device):
            plan(tensors)
    return True


def remember(
    kind: Hashable, tensors: tuple[Tensor | None, ...], *launches: Launch, scratch: tuple[Tensor, ...] = ()
) -> None:
    """Keeps a call's launches for `run`, if all that they took are its tensors as they are, each once, and numbers.

    They may stand in records, and in records of these.

    Args:
        kind: of the call.
        tensors: the call's, the first of which is none that may be missing.
        launches: in their order.
        scratch: float32, contiguous, what one launch leaves to the next: made anew for every call.
    """
    everything = (*tensors, *scratch)
    given = {id(x): place for place, x in enumerate(everything) if x is not None}
    if not POSSIBLE or len(given) != sum(x is not None for x in everything):
        return
    for launch in launches:
        if launch.compiled is None or any(id(x) not in given for x in tensors_in(tuple(launch.given()))):
            return
    if len(_plans) >= MOST:
        _plans.clear()
    plans = tuple(Plan(launch.compiled, launch.grid, launch.given(), given) for launch in launches)
    _plans[kind] = Plans(plans, tuple(x.shape for x in scratch))
