"""Relative attention over lengths: time and peak memory of every contestant, and their picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pyxlbert.bench import memory, ops, report
from pyxlbert.bench.contest import Settings
from pyxlbert.bench.report import Row, is_peer

from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Use

SUBJECT = "relative_attention by length"
SPEC = SPECS["relative_attention"]


@dataclass(frozen=True)
class LengthRace:
    """One sequence, 12 heads of 64."""

    case: Case
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{SUBJECT} {self.case.id} {self.dtype}"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Measures the memory of each contestant in its own process; those that fit take turns."""
        names = [name for name in contestants(self.case) if settings.wants(name)]
        peaks = {name: memory.measure(ops.alone, SPEC.name, self.case, self.dtype, name) for name in names}
        large = {name: f"needs more than {memory.MOST >> 30} GiB" for name, peak in peaks.items() if peak is None}
        rounds = 3 if self.case.inputs.queries >= 4096 else 7
        found = ops.race_of(SPEC, self.case, self.dtype, rounds).run(
            without=large, settings=replace(settings, memory=False)
        )
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        return replace(found, subject=SUBJECT, memory=known)


def contestants(case: Case) -> tuple[str, ...]:
    """Ours first."""
    return ("pyxlbert", *ops.opponents_of(SPEC, case).peers)


def races() -> Iterator[LengthRace]:
    """Every race of `python -m pyxlbert.bench lengths`."""
    for dtype in (torch.float32, torch.bfloat16):
        for gradients in (False, True):
            cases = [case for case in SPEC.used(Use.LENGTHS) if case.gradients == gradients]
            for case in sorted(cases, key=lambda case: case.inputs.queries):
                if dtype in case.uses[Use.LENGTHS]:
                    yield LengthRace(case, dtype)


def draw(results: Path, picture: Path) -> None:
    """The picture of docs/ops/relative_attention.md from a file of results.

    Args:
        results: JSON that `--out` of the suite `lengths` wrote.
        picture: a file that matplotlib can write, by its ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report.read(results)["rows"] if row["subject"] == SUBJECT]
    forward = [case for case in SPEC.used(Use.LENGTHS) if not case.gradients]
    names, ticks = contestants(forward[0]), sorted(case.inputs.queries for case in forward)
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), sharex=True, sharey="row", layout="constrained")
    kinds = [(dtype, backward) for dtype in ("float32", "bfloat16") for backward in (False, True)]
    for column, (dtype, backward) in enumerate(kinds):
        of_kind = [row for row in rows if row["dtype"] == dtype and ("backward" in row["case"]) == backward]
        lengths = dict(sorted((int(row["case"].split("x")[1]), row) for row in of_kind))
        for index, name in enumerate(names):
            style = {"label": name, "color": f"C{index}", "marker": "o", "linewidth": 1 if index else 2}
            timed = [(t, row["timings"][name]["median"]) for t, row in lengths.items() if name in row["timings"]]
            peaks = [(t, max(row["memory"][name], 1e6) / 1e6) for t, row in lengths.items() if name in row["memory"]]
            if not is_peer(name) and not name.startswith("pyxlbert"):
                peaks = []  # its T x T bias is an input
            for axis, points in zip(axes[:, column], (timed, peaks), strict=True):
                if points:
                    axis.loglog(*zip(*points, strict=True), markersize=3, **style)
        axes[0, column].set_title(f"{dtype}, forward{' + backward' if backward else ''}")
        axes[1, column].set_xlabel("tokens")
        for axis in axes[:, column]:
            axis.set_yscale("log", base=10)
            axis.set_xticks(ticks, [str(length) for length in ticks], rotation=45)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds a call")
    axes[1, 0].set_ylabel("peak memory above inputs and results, MB (1 at least)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
