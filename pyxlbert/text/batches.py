"""Work in batches, longest texts first, under a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

import numpy as np

# A progress bar that nobody asked for appears after so many seconds, on a terminal.
BAR_DELAY = 2.0


def longest_first(lengths: list[int], batch_size: int, show_progress: bool | None) -> Iterator[list[int]]:
    """Rows of each batch. Longest first: memory is at its largest at once, and the bar's estimate never grows."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if show_progress is False or (show_progress is None and len(order) <= batch_size):
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
        return
    from tqdm import tqdm

    bar = tqdm(
        total=len(order),
        unit="text",
        delay=BAR_DELAY if show_progress is None else 0,
        disable=None if show_progress is None else False,  # None: unless it is a terminal
    )
    with bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            bar.update(len(rows))


def check_texts(texts: object, name: str = "texts") -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: they are not several str.
    """
    if isinstance(texts, (bytes, bytearray, Mapping, AbstractSet)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: got {type(texts).__name__}, wanted a str or a list of str")
    items = list(texts)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise TypeError(f"{name}: item {index} is {type(item).__name__}, wanted str")
    return items


def check_count(name: str, value: object) -> None:
    """A whole number from 1 on.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, wanted at least 1")


def check_switch(name: str, value: object) -> None:
    """True, False or None.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, wanted True, False or None")
