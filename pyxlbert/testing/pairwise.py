"""Crossed options: a small set of cases in which every pair of option values meets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

CANDIDATES = 10  # random rows of which the one that covers most new pairs is taken


Excluded = Callable[[Mapping[str, Any]], bool]


def pairwise_cases(
    options: Mapping[str, Sequence[Any]], *, seed: int, count: int | None = None, excluded: Excluded | None = None
) -> list[dict[str, Any]]:
    """Cases in which every possible pair of values of two different options occurs at least once.

    The covering is greedy and depends only on the arguments: the same seed gives the same cases everywhere, and a
    larger `count` begins with the cases of a smaller one.

    Args:
        options: each option's values.
        seed: of the random choices.
        count: how many cases; None takes as many as the covering needs, more are filled up with random ones.
        excluded: of two options and their values, whether they cannot stand together. No case holds such a pair.

    Returns:
        The cases, one value per option each.
    """
    rng = random.Random(seed)
    sizes = {name: len(values) for name, values in options.items()}
    never = _excluded_pairs(options, excluded)
    open_pairs = set(_pairs_of(sizes)) - never
    rows: list[dict[str, int]] = []
    while open_pairs if count is None else len(rows) < count:
        in_order = sorted(open_pairs)
        candidates = [_row(sizes, open_pairs, in_order, never, rng) for _ in range(CANDIDATES if open_pairs else 1)]
        best = max(candidates, key=lambda row: len(open_pairs & set(_pairs(row))))
        open_pairs -= set(_pairs(best))
        rows.append(best)
    return [{name: options[name][index] for name, index in row.items()} for row in rows]


def uncovered_pairs(
    options: Mapping[str, Sequence[Any]], cases: Sequence[Mapping[str, Any]], excluded: Excluded | None = None
) -> int:
    """How many possible pairs of values of two different options meet in no case.

    Raises:
        AssertionError: a case holds an excluded pair.
    """
    rows = [{name: list(options[name]).index(case[name]) for name in options} for case in cases]
    met = {pair for row in rows for pair in _pairs(row)}
    never = _excluded_pairs(options, excluded)
    if met & never:
        raise AssertionError(f"{len(met & never)} excluded pairs are met")
    return len(set(_pairs_of({name: len(values) for name, values in options.items()})) - met - never)


Pair = tuple[str, int, str, int]


def _pairs_of(sizes: Mapping[str, int]) -> Iterator[Pair]:
    for a, b in combinations(sorted(sizes), 2):
        yield from ((a, i, b, j) for i in range(sizes[a]) for j in range(sizes[b]))


def _pairs(row: Mapping[str, int]) -> Iterator[Pair]:
    names = sorted(row)
    yield from ((a, row[a], b, row[b]) for a, b in combinations(names, 2))


def _excluded_pairs(options: Mapping[str, Sequence[Any]], excluded: Excluded | None) -> set[Pair]:
    if excluded is None:
        return set()
    sizes = {name: len(values) for name, values in options.items()}
    return {(a, i, b, j) for a, i, b, j in _pairs_of(sizes) if excluded({a: options[a][i], b: options[b][j]})}


def _row(
    sizes: Mapping[str, int], open_pairs: set[Pair], in_order: list[Pair], never: set[Pair], rng: random.Random
) -> dict[str, int]:
    """A row that starts from an open pair and takes, option by option, the value that closes most pairs."""
    while True:
        row: dict[str, int] = {}
        if open_pairs:
            a, i, b, j = rng.choice(in_order)
            row = {a: i, b: j}
        rest = [name for name in sizes if name not in row]
        rng.shuffle(rest)
        for name in rest:
            values = [value for value in range(sizes[name]) if not _with(name, value, row) & never]
            if not values:
                break  # the values taken so far leave none to this option: begin again
            rng.shuffle(values)
            row[name] = max(values, key=lambda value: len(_with(name, value, row) & open_pairs))
        else:
            return row


def _with(name: str, value: int, row: Mapping[str, int]) -> set[Pair]:
    """The pairs that a value makes with those taken so far."""
    return {(name, value, o, v) if name < o else (o, v, name, value) for o, v in row.items()}
