"""What a call of a recorded race does, of results that were written before rows said it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch
from pyxlbert.bench.report import Row, Work
from pyxlbert.bench.shapes import length_of

from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Draw, Spec


def counted(rows: Iterable[Row]) -> list[Row]:
    """The rows, each with the work that its op's spec counts for a case of this name, where it has none of its own."""
    return [row if any(row.work) else replace(row, work=_work(row.subject, row.case, row.dtype)) for row in rows]


@cache
def _work(subject: str, case: str, dtype: str) -> Work:
    spec = SPECS.get(subject.removesuffix(" by length"))
    if spec is None:
        return Work()
    name = case.removesuffix(", pages kept")
    for one in spec.cases:
        if one.id == name:
            try:
                # Sizes are what is counted: there are no numbers.
                return _of(spec, one, Draw(None, getattr(torch, dtype), torch.device("meta")))
            except (RuntimeError, NotImplementedError):  # but lengths, which are
                generator = torch.Generator().manual_seed(0)
                return _of(spec, one, Draw(generator, getattr(torch, dtype), torch.device("cpu")))
    return Work()


def _of(spec: Spec, case: Case, draw: Draw) -> Work:
    arguments = spec.make(case.inputs, draw)
    flops = None if spec.flops is None else spec.flops(arguments, case.gradients)
    return Work(flops, spec.bytes_moved(arguments, case.gradients), length_of(case))
