"""Cases that are timed, at sizes for tests."""

from __future__ import annotations

from dataclasses import replace

from pyxlbert.testing.specs._attention import Scores
from pyxlbert.testing.specs._spec import Case


def small(case: Case) -> Case:
    """The same call on few rows or tokens."""
    inputs = case.inputs
    if isinstance(inputs, Scores):
        return replace(case, inputs=inputs.sized(2, 16, inputs.head_size))
    if hasattr(inputs, "inner"):
        return replace(case, inputs=replace(inputs, batch=2, length=5, hidden=48, inner=80, heads=3, head_size=16))
    *_, last = inputs.shape
    if hasattr(inputs, "entries"):
        return replace(case, inputs=replace(inputs, shape=(4, 8), columns=64, entries=50))
    return replace(case, inputs=replace(inputs, shape=(32, min(last, 1024))))
