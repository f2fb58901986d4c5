"""A race's contestants one by one: the answer first, then the time; who fails is a reason and stops nobody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from pyxlbert.bench.families import family_of
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Contestants, Failed, Tell, Timing, nobody, running

# (name, output); raises AssertionError where the output is not what is wanted.
Check = Callable[[str, Any], None]


def lazily(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A call that is made when it is first called: what fails in making it is its own failure and not the race's."""
    made = cache(make)
    return lambda: made()()


@dataclass(frozen=True)
class Settings:
    """What the command asks of every race.

    Attributes:
        rounds: samples of each contestant; None: as many as the race says.
        rest: seconds before each sample; None: as long as the race says.
        peers: names of FAMILIES that are timed; None: all.  Ours always is.
        memory: whether peak memory is measured too, in a process for each contestant.
    """

    rounds: int | None = None
    rest: float | None = None
    peers: frozenset[str] | None = None
    memory: bool = False

    def wants(self, contestant: str) -> bool:
        """Whether it is timed."""
        return self.peers is None or contestant.startswith("pyxlbert") or family_of(contestant) in self.peers


class Asked(NamedTuple):
    """What a race is asked beside where it runs.

    Attributes:
        tell: is told whose answer is checked and whose turn it is.
        without: contestants that are not called, and why.
        settings: of the command.
        cache_bytes: of the cache that copies of the inputs are larger than; None: the device's.
    """

    tell: Tell
    without: Mapping[str, str]
    settings: Settings
    cache_bytes: int | None


class Contested:
    """A kind of race that a worker can run: see `apart`."""

    def run(
        self,
        device: str = "cpu",
        *,
        tell: Tell = nobody,
        without: Mapping[str, str] | None = None,
        settings: Settings = Settings(),
        cache_bytes: int | None = None,
    ) -> Row:
        """Checks the answers, then times those that were right on the CPU or on the GPU that is here ("cuda"); see
        `Asked`.
        """
        return self.held(device, Asked(tell, without or {}, settings, cache_bytes))

    def held(self, device: str, asked: Asked) -> Row:
        """The race itself."""
        raise NotImplementedError


class Poisoned(RuntimeError):
    """After this error of a contestant the device fails every later call of the process.

    Attributes:
        name: the contestant's.
        reason: the error in words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def reason_of(error: BaseException) -> str:
    """An error as one line; a wrong answer as that."""
    first = (str(error).strip().splitlines() or [""])[0]
    kind = "wrong answer" if isinstance(error, AssertionError) else type(error).__name__
    return f"{kind}: {first}"[:240]


def poisons(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, leaves the process without a device."""
    while error is not None:
        # Too little memory is said as "CUDA out of memory", and the next call may have enough.
        if "CUDA error" in str(error) and not isinstance(error, torch.cuda.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def contest(
    copies: Sequence[Contestants],
    check: Check,
    timer: Callable[[list[Contestants]], dict[str, Timing]],
    *,
    tell: Tell = nobody,
    without: Mapping[str, str] | None = None,
    wants: Callable[[str], bool] = lambda name: True,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Checks every contestant's answer on the first copy of the inputs, then times those that were right.

    Args:
        copies: the contestants on each copy of the inputs, in the order in which they are checked.
        check: of an answer.
        timer: times contestants that are given for each copy.
        tell: is told whose answer is checked.
        without: contestants that are not called, and why.
        wants: whether a contestant is timed once it is known to be right.

    Returns:
        the timings, and of the others why there are none.

    Raises:
        Poisoned: a contestant's error was one that no later call of this process survives.
    """
    failed = {name: why for name, why in (without or {}).items() if name in copies[0]}
    right: list[str] = []

    for name, call in copies[0].items():
        if name in failed:
            continue
        tell(name)
        try:
            with running(name):
                output = call()
                # An error of a kernel is its contestant's, not the next one's.
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                check(name, output)
        except Failed as error:
            failed[name] = _survived(error)
        else:
            if wants(name):
                right.append(name)
        output = None
    while right:
        try:
            return timer([{name: one[name] for name in right} for one in copies]), failed
        except Failed as error:
            failed[error.name] = _survived(error)
            right.remove(error.name)
    return {}, failed


def _survived(error: Failed) -> str:
    reason = reason_of(error.__cause__ or error)
    if poisons(error.__cause__):
        raise Poisoned(error.name, reason) from error
    return reason
