"""What pretraining asks of its numbers, before anything is read."""

from __future__ import annotations

from pyxlbert.training.options import MOST

#: Tokens of a row, and pieces of a vocabulary, for which memory is taken before any text is read.
MOST_LENGTH, MOST_PIECES = 2**20, 2**22


def require_integer(name: str, value: object, least: int, most: int = MOST) -> None:
    """Raises TypeError for what is no integer, ValueError for one that is less than `least` or more than `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, wanted an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")
    if value > most:
        raise ValueError(f"{name}: got {value}, wanted at most {most}")


def require_share(name: str, value: object) -> None:
    """Raises TypeError for what is no number, ValueError for one outside 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}, wanted a number from 0 to 1")
    if not 0 <= value <= 1:  # NaN is not
        raise ValueError(f"{name}: got {value}, wanted a number from 0 to 1")
