"""Parity of ops: every case of a spec on every runner, forward and backward, in poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from pyxlbert import backends
from pyxlbert.backends import OPS
from pyxlbert.testing import poison, runners
from pyxlbert.testing.parity.rows import NOT_RUN, Gathered, Row
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Spec

# Cases of an op in a minute's run.
QUICK = 6

DIRECTIONS = {"out": "forward", "grad": "backward"}


def rows(ops: list[str], names: list[str], dtypes: list[torch.dtype], quick: bool) -> Iterator[Row]:
    """The rows of some ops.

    Args:
        ops: their names.
        names: backends, whether they are here or not.
        dtypes: as far as an op takes them.
        quick: a few small cases, and the active level of backend "cpu" alone.
    """
    here = [one for one in runners.runners() if one.partition("/")[0] in names]
    if quick:
        here = [one for one in here if runners.best_level(one)]
    for name in ops:
        spec = SPECS[name]
        for dtype in spec.dtypes:
            if dtype in dtypes:
                yield from _of(spec, runners.of(spec, here), dtype, quick)
        for backend in names:
            reason = backends.unavailable(backend)
            if reason is None and backend not in OPS[name].backends:
                reason = f"{name} has no {backend} kernel"
            if reason is not None:
                yield Row(name, backend, "", "", reason=reason)


def cases(spec: Spec, quick: bool) -> list[Case]:
    """Of the suite, without those that only `make test-all` runs; `quick`: a few small ones."""
    suite = [case for case in spec.suite if not case.full_only]
    return [case for case in suite if case.small][:QUICK] if quick else suite


def _of(spec: Spec, names: list[str], dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    found = {(name, direction): Gathered() for name in names for direction in DIRECTIONS.values()}
    for case in cases(spec, quick):
        for name in names:
            if name not in runners.slow() or case.small:
                _run(spec, case, dtype, name, found)
    label = str(dtype).removeprefix("torch.")
    for name in names:
        for direction in DIRECTIONS.values():
            row = found[name, direction].row(spec.name, name, label, direction)
            if spec.composed and direction == "backward" and not row.compared and row.verdict == NOT_RUN:
                row = replace(row, reason="with a gradient to come it is made of other ops")
            yield row


def _run(spec: Spec, case: Case, dtype: torch.dtype, name: str, found: dict[tuple[str, str], Gathered]) -> None:
    """One case on one runner."""
    arguments = runners.arguments_of(spec, case, dtype, runners.device_of(name))
    both = {direction: found[name, direction] for direction in DIRECTIONS.values()}
    refusal = OPS[spec.name].refusal(name.partition("/")[0], runners.deciding(arguments))
    if refusal is not None:
        for one in both.values():
            one.refused.append(refusal)
        return
    with runners.running(name) as backend:
        run(spec, case, arguments, lambda **given: spec.function(**given, backend=backend), both, backend)


def run(
    spec: Spec,
    case: Case,
    arguments: Arguments,
    function: Callable[..., Any],
    found: dict[str, Gathered],
    backend: str = "",
) -> runners.Results | None:
    """One case of a function that takes an op's arguments, in poisoned memory; None where it raised.

    Args:
        found: is told of every result, by direction.
        backend: whose budget counts, where it has one of its own.
    """
    dtype = runners.deciding(arguments).dtype
    try:
        with poison.poisoned():
            ours = runners.run(function, spec, arguments, case.gradients)
    except Exception as error:  # a kernel that raises is a row like one that is wrong
        for one in found.values():
            one.fail(case.id, f"{type(error).__name__}: {error}")
        return None
    for result, value in ours.items():
        where, one = f"{case.id}, {result}", found[DIRECTIONS[result.partition(" ")[0]]]
        try:
            one.add(where, runners.errors_of(spec, case, {result: value}, dtype, backend)[result])
        except AssertionError as error:
            one.fail(where, str(error))
    return ours
