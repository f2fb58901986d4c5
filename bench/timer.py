"""The one timer: contestants take turns in one process, in a new order every round."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pyxlbert.bench.statistics import quartiles

Contestants = dict[str, Callable[[], object]]
# The same contestants on several copies of the inputs, or on one.
Copies = Contestants | Sequence[Contestants]


Tell = Callable[[str], None]


def nobody(name: str) -> None:
    """A `Tell` that nobody hears."""


class Failed(RuntimeError):
    """A contestant raised; the cause is its error.

    Attributes:
        name: the contestant's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def running(name: str) -> Iterator[None]:
    """Inside of it an error is this contestant's.

    Raises:
        Failed: from any error.
    """
    try:
        yield
    except Exception as error:
        raise Failed(name) from error


def copies_for(size: int, cache: int) -> int:
    """How many copies of inputs of `size` bytes are more than twice a cache of `cache` bytes; one without a cache."""
    return 1 + 2 * cache // size if cache else 1


class _Turns:
    """Every call, whoever's it is, takes the next copy: none finds in the cache what the call before it has read."""

    def __init__(self, copies: Copies) -> None:
        self._copies = [copies] if isinstance(copies, dict) else list(copies)
        self._place = itertools.count()
        self.copies = len(self._copies)
        self.names = list(self._copies[0])

    def call(self, name: str) -> None:
        self._copies[next(self._place) % len(self._copies)][name]()


@dataclass(frozen=True)
class Timing:
    """Seconds a call over all rounds: the median and the quartiles, and each round's in their order."""

    median: float
    lower: float
    upper: float
    rounds: int
    samples: tuple[float, ...] = ()


def race(
    contestants: Copies, *, rounds: int = 11, least: float = 0.02, rest: float = 0.0, seed: int = 0, tell: Tell = nobody
) -> dict[str, Timing]:
    """Times every contestant in every round.

    A machine that slows down for some seconds slows all of them, so the ratios hold where the
    absolute numbers do not.  The order is shuffled: whoever runs after a heavy one finds cold caches.

    Args:
        contestants: name to a call without arguments, once or for each copy of the inputs.
        rounds: samples of each.
        least: seconds that a sample should last; short calls are repeated inside it.
        rest: seconds before each sample, in which the threads of the last contestant stop spinning; the first call
            after it is not timed.
        seed: of the order.
        tell: is told whose turn it is, outside of what is timed.

    Returns:
        the timing of each contestant.

    Raises:
        Failed: a contestant raised.
    """
    turns, repeats = _Turns(contestants), {}
    for name in turns.names:
        tell(name)
        with running(name):
            seconds = _time(turns, name)
            if seconds < 50 * least:  # the first call may have made something that the next ones find
                seconds = _time(turns, name)
        repeats[name] = max(1, round(least / max(seconds, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in turns.names}
    order = list(turns.names)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            tell(name)
            with running(name):
                if rest:
                    time.sleep(rest)
                    turns.call(name)
                samples[name].append(_time(turns, name, repeats[name]))
    return {name: _timing(values, rounds) for name, values in samples.items()}


def race_on(
    device: str, contestants: Copies, *, rounds: int = 11, rest: float = 0.0, tell: Tell = nobody
) -> dict[str, Timing]:
    """`race` where the calls' tensors are: "cpu", or "cuda" with the GPU's own clock, which needs no rest."""
    if device == "cpu":
        return race(contestants, rounds=rounds, rest=rest, tell=tell)
    return race_on_gpu(contestants, rounds=rounds, tell=tell)


def race_on_gpu(contestants: Copies, *, rounds: int = 51, seed: int = 0, tell: Tell = nobody) -> dict[str, Timing]:
    """Times every contestant in every round by events on the GPU's stream, in a new order every round.

    The GPU first waits a moment, in which the host gets ahead: then there are no gaps between a call's kernels, as in a
    model that keeps the device busy.  All copies of the inputs together are to be larger than the L2 cache, or what is
    timed is the cache: see `copies_for`.

    Args:
        contestants: name to a call without arguments, once or for each copy of the inputs.
        rounds: samples of each.
        seed: of the order.
        tell: is told whose turn it is, outside of what is timed.

    Returns:
        the timing of each contestant.

    Raises:
        Failed: a contestant raised.
    """
    import torch

    turns = _Turns(contestants)
    for name in turns.names:
        tell(name)
        with running(name):
            for _ in range(max(3, turns.copies)):
                turns.call(name)
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in turns.names}
    order = list(turns.names)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            tell(name)
            with running(name):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
                start.record()
                turns.call(name)
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: _timing(values, rounds) for name, values in samples.items()}


def _timing(samples: list[float], rounds: int) -> Timing:
    lower, median, upper = quartiles(samples)
    return Timing(median, lower, upper, rounds, tuple(samples))


def _time(turns: _Turns, name: str, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        turns.call(name)
    return (time.perf_counter() - start) / repeats
