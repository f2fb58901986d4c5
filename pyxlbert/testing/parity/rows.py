"""A row of the report: one subject on one runner in one dtype and direction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyxlbert.testing import compare

# Verdicts, the worst last.
NOT_RUN, OK, OVER, WRONG = "not run", "ok", "over budget", "wrong"


@dataclass(frozen=True)
class Row:
    """What became of some results that belong together.

    Attributes:
        subject: an op or a model.
        runner: a backend, "cpu/avx2" for a level of it.
        dtype: "float32", ...
        direction: "forward" or "backward".
        compared: how many tensors.
        error, plain: the relative L2 error against float64 of the result that uses most of its budget, and that of
            plain PyTorch in the same dtype; None where nothing was compared.
        share: of its budget; over 1 is over.
        where: the case and the result.
        verdict: "ok", "over budget", "wrong" (not finite, another shape, an exception) or "not run".
        reason: of the verdict, unless it is "ok".
    """

    subject: str
    runner: str
    dtype: str
    direction: str
    compared: int = 0
    error: float | None = None
    plain: float | None = None
    share: float | None = None
    where: str = ""
    verdict: str = NOT_RUN
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over plain PyTorch's error; None where either is zero or unknown."""
        return self.error / self.plain if self.error and self.plain else None


@dataclass
class Gathered:
    """A row while its cases run."""

    compared: int = 0
    worst: compare.Errors | None = None
    where: str = ""
    wrong: str = ""
    refused: list[str] = field(default_factory=list)

    def add(self, where: str, errors: compare.Errors) -> None:
        """A result that was compared."""
        self.compared += 1
        if self.worst is None or not errors.share <= self.worst.share:
            self.worst, self.where = errors, where

    def fail(self, where: str, reason: str) -> None:
        """A case that has no result to compare; the first is shown."""
        self.wrong = self.wrong or f"{where}: {reason}"

    def row(self, subject: str, runner: str, dtype: str, direction: str) -> Row:
        """What it has come to."""
        verdict, reason = OK, ""
        share = None if self.worst is None else self.worst.share
        if self.wrong:
            verdict, reason = WRONG, self.wrong
        elif share is None:
            verdict, reason = NOT_RUN, self.refused[0] if self.refused else "no case of this op asks for it"
        elif math.isnan(share) or share > 1:
            verdict, reason = OVER, f"{self.where}: {share:.3g} times the budget"
        worst = self.worst
        return Row(
            *(subject, runner, dtype, direction, self.compared),
            *((None, None, None) if worst is None else (worst.l2, worst.plain_l2, worst.share)),
            *(self.where, verdict, reason),
        )
