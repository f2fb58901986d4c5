"""Launches that are remembered: of a call like an earlier one only the addresses are new.

Triton looks at every argument of every launch, which for attention takes longer than all else on the host.  What a
forward kernel is given follows from its tensors' dtypes, shapes, strides and alignments and from the options: by these
the compiled kernel and its numbers are kept, and the next call puts its tensors into their places.
"""

from __future__ import annotations

from collections.abc import Hashable
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
    """A compiled kernel, its grid and arguments, with holes where the tensors of a call go.

    Args:
        compiled: what the first launch returned.
        grid: of it.
        arguments: all of them, in the order of the kernel's signature, constants too; records as plain tuples.
        holes: place in `arguments`, place in the record that stands there or None, and place among the tensors.
    """

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: list[Any],
        holes: tuple[tuple[int, int | None, int], ...],
    ) -> None:
        self.compiled, self.arguments, self.holes = compiled, arguments, holes
        self.grid = (*grid, 1, 1)[:3]

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        arguments = self.arguments.copy()
        for place, field, tensor in self.holes:
            if field is None:
                arguments[place] = tensors[tensor]
            else:
                record = arguments[place]
                arguments[place] = (*record[:field], tensors[tensor], *record[field + 1 :])
        self.compiled[self.grid](*arguments)


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

    They may stand in records, which hold no records themselves.
    """
    given = {id(x): place for place, x in enumerate(tensors) if x is not None}
    if compiled is None or not POSSIBLE or len(given) != sum(x is not None for x in tensors):
        return
    filled = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
    holes: list[tuple[int, int | None, int]] = []
    for place, argument in enumerate(filled):
        if isinstance(argument, tuple):
            tensors_of = [(field, x) for field, x in enumerate(argument) if isinstance(x, Tensor)]
            filled[place] = tuple(None if isinstance(x, Tensor) else x for x in argument)
        else:
            tensors_of = [(None, argument)] if isinstance(argument, Tensor) else []
            filled[place] = None if tensors_of else argument
        if any(id(x) not in given for _, x in tensors_of):
            return
        holes += [(place, field, given[id(x)]) for field, x in tensors_of]
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[kind] = Plan(compiled, grid, filled, tuple(holes))
