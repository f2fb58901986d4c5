"""What `accelerate` did with each module, and why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: its path in the model.
        was: its class.
        now: what runs in its place; None: it was left alone.
        reason: why it was left alone, or what there is to know.
    """

    name: str
    was: str
    now: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        text = f"{self.name or '(model)'}: {self.was} -> {self.now or 'left alone'}"
        return text if self.reason is None else f"{text}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """All entries, in the model's order."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """What runs on our ops."""
        return tuple(entry for entry in self.entries if entry.now is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """What was left alone, each with the reason."""
        return tuple(entry for entry in self.entries if entry.now is None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries))
