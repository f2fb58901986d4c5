"""Packed weights: what the modules keep of a linear layer for inference on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:
    from pyxlbert.cpu import _packed
except ImportError:  # backend "cpu" is not here
    _packed = None  # type: ignore[assignment]


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, quantised: bool = False) -> Any:
    """See `pyxlbert.cpu._packed.pack`; None if there is nothing to gain."""
    return _packed.pack(weights, biases, quantised) if _packed is not None and _packed.gains(weights) else None


def readable(packed: Any) -> bool:
    """Whether the active instruction-set level is the one that a weight was packed for."""
    return _packed.readable(packed)


def product(x: Tensor, packed: Any, activation: str) -> Tensor:
    """See `pyxlbert.cpu._packed.product`."""
    return _packed.product(x, packed, activation)
