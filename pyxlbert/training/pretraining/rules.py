"""What pretraining asks of its numbers, before anything is read."""

from __future__ import annotations

import math


def require_integer(name: str, value: object, least: int) -> None:
    """Raises TypeError for what is no integer, ValueError for one that is less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, wanted an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")


def require_share(name: str, value: object) -> None:
    """Raises TypeError for what is no number, ValueError for one outside 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}, wanted a number from 0 to 1")
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: got {value}, wanted a number from 0 to 1")
