"""Relative attention over lengths: time and peak memory of every contestant, and their picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pyxlbert.bench import memory
from pyxlbert.bench.relative import Problem
from pyxlbert.bench.report import Row, is_peer
from pyxlbert.bench.timer import race

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SUBJECT = "relative_attention by length"


@dataclass(frozen=True)
class LengthRace:
    """One sequence, 12 heads of 64."""

    problem: Problem

    def __str__(self) -> str:
        return f"{SUBJECT} {self.problem.case} {self.problem.dtype}"

    def run(self) -> Row:
        """Measures the memory of each contestant in its own process; those that fit are timed, taking turns."""
        problem = self.problem
        names = problem.contestants()
        peaks = {name: memory.measure(problem, name) for name in names}
        failed = {name: f"needs more than {memory.MOST >> 30} GiB" for name, peak in peaks.items() if peak is None}
        torch.manual_seed(0)
        inputs = problem.inputs()
        calls = {name: problem.call(name, inputs) for name in names if name not in failed}
        timings = race(calls, rounds=3 if problem.length >= 4096 else 7)
        dtype = str(problem.dtype).removeprefix("torch.")
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        return Row(SUBJECT, problem.case, dtype, timings, problem.limit(), failed=failed, memory=known)


def races() -> Iterator[LengthRace]:
    """Every race of `python -m pyxlbert.bench lengths`."""
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            for length in LENGTHS:
                yield LengthRace(Problem(1, length, dtype, backward))


def draw(results: Path, picture: Path) -> None:
    """The picture of docs/ops/relative_attention.md from a file of results.

    Args:
        results: JSON that `--out` of the suite `lengths` wrote.
        picture: a file that matplotlib can write, by its ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in json.loads(results.read_text(encoding="utf-8"))["rows"] if row["subject"] == SUBJECT]
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), sharex=True, sharey="row", layout="constrained")
    kinds = [(dtype, backward) for dtype in ("float32", "bfloat16") for backward in (False, True)]
    for column, (dtype, backward) in enumerate(kinds):
        of_kind = [row for row in rows if row["dtype"] == dtype and ("backward" in row["case"]) == backward]
        lengths = dict(sorted((int(row["case"].split("x")[1]), row) for row in of_kind))
        for index, name in enumerate(Problem(1, 1, torch.float32).contestants()):
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
            axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS], rotation=45)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds a call")
    axes[1, 0].set_ylabel("peak memory above inputs and results, MB (1 at least)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
