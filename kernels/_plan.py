"""Launches that are remembered: of a call like an earlier one only the addresses are new.

Triton looks at every argument of every launch, which for attention takes longer than all else on the host.  What a
forward kernel is given follows from its tensors' dtypes, shapes, strides and alignments and from the options: by these
the compiled kernel and its numbers are kept, and the next call puts its tensors into their places.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

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

_plans: dict[Hashable, Plan] = {}


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
    kind: Hashable,
    tensors: tuple[Tensor | None, ...],
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Keeps a launch for `run`, if all that it took are these tensors as they are, each once, and numbers.

    They may stand in records, and in records of these.
    """
    given = {id(x): place for place, x in enumerate(tensors) if x is not None}
    if compiled is None or not POSSIBLE or len(given) != sum(x is not None for x in tensors):
        return
    filled = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
    if any(id(x) not in given for x in tensors_in(tuple(filled))):
        return
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[kind] = Plan(compiled, grid, filled, given)
