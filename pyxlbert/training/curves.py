"""The course of a run: a CSV file, TensorBoard's if it is installed, a picture at the end."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

from pyxlbert.files import whole_file
from pyxlbert.training.packages import require

FILE, PICTURE, FOLDER = "curves.csv", "curves.png", "tensorboard"
FIRST = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "examples_per_second")


class Curves:
    """Points of a run. Each is in the file at once.

    Args:
        directory: of the run.
        step: what was written after this step is dropped: it will be trained again.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._path, self._directory = directory / FILE, directory
        self.points: list[dict[str, Any]] = []
        if step and self._path.is_file():
            with self._path.open(encoding="utf-8", newline="") as file:
                # A run that was killed may have left the last line unfinished; it is behind the checkpoint.
                rows = [row for row in csv.DictReader(file) if row["step"].isdecimal() and int(row["step"]) <= step]
            self.points = [_numbers(row) for row in rows]
        self._names: list[str] = []
        self._rewrite()
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(directory / FOLDER, purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point: what is known of a step."""
        self.points.append({"step": step, **values})
        if set(values) <= set(self._names):
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._names).writerow(self.points[-1])
        else:
            self._rewrite()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _rewrite(self) -> None:
        """Writes all points, with columns for all that is known."""
        self._names = list(dict.fromkeys([*FIRST, *(name for point in self.points for name in point)]))
        with whole_file(self._path) as path, path.open("x", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._names)
            writer.writeheader()
            writer.writerows(self.points)

    def finish(self, title: str) -> None:
        """Closes TensorBoard's file and draws the picture: the loss, the rate, and what was evaluated."""
        if self._board is not None:
            self._board.close()
        draw(self.points, self._directory / PICTURE, title)


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in row.items() if value}
    numbers["step"] = int(numbers["step"])
    return numbers


def draw(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the points of a run: loss and learning rate by step on the left, scores on the right.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("curves", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    # Names of files and labels are no formulas, whatever they are made of: $, and bytes that are no text.
    figure.suptitle(_text(title), parse_math=False)
    left, right = figure.subplots(1, 2)
    rate = left.twinx()
    for axes, name, style in ((left, "loss", "-"), (rate, "learning_rate", ":")):
        chosen = [point for point in points if name in point]
        line = axes.plot([p["step"] for p in chosen], [p[name] for p in chosen], style, label=name)
        line[0].set_color("C0" if name == "loss" else "C1")
        axes.set_ylabel(name.replace("_", " "))
    left.set_xlabel("step")
    left.grid(alpha=0.3)
    scores = sorted({name for point in points for name in point if name.startswith("dev_")})
    for name in scores:
        chosen = [point for point in points if name in point]
        label = _text(name.removeprefix("dev_"))
        right.plot([p["step"] for p in chosen], [p[name] for p in chosen], ".-", label=label)
    right.set(xlabel="step", ylabel="on the development data")
    right.grid(alpha=0.3)
    if scores:
        for text in right.legend().get_texts():
            text.set_parse_math(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _text(name: str) -> str:
    """A name that can be drawn: a question mark stands for each byte of it that is not UTF-8."""
    return name.encode("utf-8", "replace").decode("utf-8")
