"""Cases that are timed, at sizes for tests."""

from __future__ import annotations

from dataclasses import replace

from pyxlbert.testing.specs._scores import Scores
from pyxlbert.testing.specs._spec import Case


def small(case: Case) -> Case:
    """The same call on few rows or tokens."""
    inputs = case.inputs
    if isinstance(inputs, Scores):
        return replace(case, inputs=inputs.sized(2, 16, inputs.head_size))
    *_, last = inputs.shape
    if hasattr(inputs, "entries"):
        return replace(case, inputs=replace(inputs, shape=(4, 8), columns=64, entries=50))
    return replace(case, inputs=replace(inputs, shape=(32, min(last, 1024))))
