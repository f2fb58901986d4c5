"""Races in a process of their own: what ends it, or leaves it without a device, costs one contestant its time.

The process that asks never calls the device: it lists the races, hands them to the worker one by one, and if the worker
is lost hands the same race, without the contestant that was at work, to a new one.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyxlbert.bench import report
from pyxlbert.bench.contest import Poisoned, poisons, reason_of
from pyxlbert.bench.report import RACE, Row

# A function of a module, since the worker imports it: every race, always in the same order.
Source = Callable[[], Iterable[Any]]
# Seconds that a contestant may be silent: a first call may compile a whole model.
PATIENCE = 90.0
# And a process that starts.
START = 120.0


@dataclass(frozen=True)
class Found:
    """What came of a race.

    Attributes:
        row: its result; `failed` says what has no time, and why.
        device: of the process that ran it, see `report.device`; empty if it did not live to say so.
    """

    row: Row
    device: dict[str, object]


def run(
    source: Source,
    device: str,
    *,
    only: str = "",
    end: float = float("inf"),
    patience: float = PATIENCE,
    describe: Callable[[], dict[str, object]] = report.device,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Found]:
    """Runs every race of `source`, each result as it comes.

    Args:
        source: makes the races.
        device: "cpu" or "cuda".
        only: races whose line holds this text.
        end: of `time.monotonic()`, after which no race is begun.
        patience: seconds in which nothing is heard of a contestant before its process is ended.
        describe: what a process says of its device, once.
        options: further keywords of every race's `run`.
    """
    worker: _Worker | None = None
    try:
        for index, race in enumerate(source()):
            if only not in str(race):
                continue
            without: dict[str, str] = {}
            while True:
                if time.monotonic() > end:
                    # A race that lost a contestant says so even if there is no time to run the others.
                    if without:
                        yield Found(race.row({}, without), worker.device if worker else {})
                    else:
                        print(f"NOT TIMED, no time left: {race}", file=sys.stderr)
                    break
                if worker is None:
                    worker = _Worker(patience, source, device, describe, dict(options or {}))
                row, name, reason = worker.run(index, without)
                if row is not None:
                    yield Found(row, worker.device)
                    break
                lost, worker = worker, None
                lost.end()
                print(f"LOST A PROCESS at {race}: {name}: {reason}", file=sys.stderr, flush=True)
                again = name not in without and name != RACE
                without[name] = reason
                if not again:
                    yield Found(race.row({}, without), lost.device)
                    break
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that runs races by their place in the list."""

    def __init__(self, patience: float, *work: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: compilers start processes of their own.
        self._process = context.Process(target=_work, args=(theirs, *work))
        self._process.start()
        theirs.close()
        self._patience, self._heard = patience, False
        self.device: dict[str, object] = {}

    def run(self, index: int, without: dict[str, str]) -> tuple[Row | None, str, str]:
        """The row; or None, who was at work when the process was lost, and why it was."""
        name = RACE
        try:
            self._pipe.send((index, without))
            while self._pipe.poll(patience := self._patience if self._heard else START):
                kind, *content = self._pipe.recv()
                self._heard = True
                if kind == "at":
                    (name,) = content
                elif kind == "device":
                    (self.device,) = content
                elif kind == "row":
                    return content[0], "", ""
                else:
                    return None, *content
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            return None, name, f"its process ended by signal {-code}" if code < 0 else f"its process ended with {code}"
        return None, name, f"did not end within {patience:.0f} s"

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        self._pipe.close()
        self._process.kill()
        # One that waits for the device may stay for as long as the driver likes.
        self._process.join(10)


def _work(
    pipe: Any, source: Source, device: str, describe: Callable[[], dict[str, object]], options: dict[str, Any]
) -> None:
    """What the worker does until nobody asks any more."""
    import torch

    races = list(source())
    described = False
    while True:
        try:
            index, without = pipe.recv()
        except EOFError:
            return
        race = races[index]
        try:
            if not described:
                with torch.device(device):
                    pipe.send(("device", describe()))
                described = True
            row = race.run(device, tell=lambda name: pipe.send(("at", name)), without=without, **options)
        except Poisoned as error:
            pipe.send(("lost", error.name, error.reason))
            return
        except Exception as error:
            # Not a contestant's: its inputs could not be made, or the truth was not to be had.
            if poisons(error):
                pipe.send(("lost", RACE, reason_of(error)))
                return
            row = race.row({}, {**without, RACE: reason_of(error)})
        pipe.send(("row", row))
