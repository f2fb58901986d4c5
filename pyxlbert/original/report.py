"""What became of every variable of a checkpoint, as a table."""

from __future__ import annotations

from typing import NamedTuple

INITIALISED, NEW, NEW_ZEROS, UNUSED = "initialised", "left new", "left new: zeros", "unused"


class Row(NamedTuple):
    """One variable.

    Attributes:
        name: in the checkpoint.
        shape: there.
        state: "initialised" from the checkpoint, "left new", or "unused".
        parameters: what it is called in the directory; several where all layers stand in one variable.
    """

    name: str
    shape: tuple[int, ...]
    state: str
    parameters: tuple[str, ...]


class Conversion(NamedTuple):
    """What was written.

    Attributes:
        rows: one for each variable of the model and of the checkpoint.
        class_name: of the model.
        notes: sentences on the rest.
    """

    rows: list[Row]
    class_name: str
    notes: list[str]

    def table(self) -> str:
        """The variables, one a line, and how many there are of each state."""
        lines = [("variable", "shape", "state", "parameter")]
        lines += [(row.name, str(row.shape), row.state, _named(row.parameters)) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        text = ["  ".join((*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3])) for line in lines]
        counts = (
            f"{sum(row.state == INITIALISED for row in self.rows)} variables from the checkpoint",
            f"{sum(row.state in (NEW, NEW_ZEROS) for row in self.rows)} left new",
            f"{sum(row.state == UNUSED for row in self.rows)} unused",
        )
        return "\n".join([*(line.rstrip() for line in text), ", ".join(counts)])


def _named(parameters: tuple[str, ...]) -> str:
    return parameters[0] + f" and {len(parameters) - 1} more" * (len(parameters) > 1) if parameters else ""
