"""Packed weights: what the modules keep of a linear layer for inference on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.ops._integers import Integers
from pyxlbert.ops._torch import watched

try:
    from pyxlbert.cpu import _packed
except ImportError:  # backend "cpu" is not here
    _packed = None  # type: ignore[assignment]


def require_memory(tensors: Sequence[Tensor]) -> None:
    """That parameters are there to be copied.

    Raises:
        ValueError: the memory of one was given back, as FSDP does, or shrunk.
    """
    for one in tensors:
        wrong = checks.short_storage(one)
        if wrong is not None:
            raise ValueError(f"pack: parameter: {wrong}")


def pack(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None, integers: Callable[[], Sequence[Integers]] | None = None
) -> Any:
    """See `pyxlbert.cpu._packed.pack`; None if there is nothing to gain.  `integers` gives them where they are used."""
    if _packed is None or watched() or not _packed.gains(weights, integers is not None):
        return None
    return _packed.pack(weights, biases, None if integers is None else integers())


def readable(packed: Any) -> bool:
    """Whether the active instruction-set level is the one that a weight was packed for."""
    return _packed.readable(packed)


def dtype_of(packed: Any) -> torch.dtype:
    """Of the weight before it was packed, and so of the rows that it is multiplied with."""
    return _packed.dtype_of(packed)


def product(x: Tensor, packed: Any, activation: str) -> Tensor:
    """See `pyxlbert.cpu._packed.product`."""
    return _packed.product(x, packed, activation)
