"""The one timer: contestants take turns in one process, in a new order every round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Contestants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds a call over all rounds: the median and the quartiles."""

    median: float
    lower: float
    upper: float
    rounds: int


def race(contestants: Contestants, *, rounds: int = 11, least: float = 0.02, seed: int = 0) -> dict[str, Timing]:
    """Times every contestant in every round.

    A machine that slows down for some seconds slows all of them, so the ratios hold where the
    absolute numbers do not.  The order is shuffled: whoever runs after a heavy one finds cold caches.

    Args:
        contestants: name to a call without arguments.
        rounds: samples of each.
        least: seconds that a sample should last; short calls are repeated inside it.
        seed: of the order.

    Returns:
        the timing of each contestant.
    """
    repeats = {}
    for name, call in contestants.items():
        seconds = _time(call)
        if seconds < 50 * least:  # the first call may have made something that the next ones find
            seconds = _time(call)
        repeats[name] = max(1, round(least / max(seconds, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            call = contestants[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    timings = {}
    for name, values in samples.items():
        lower, median, upper = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        timings[name] = Timing(median, lower, upper, rounds)
    return timings


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
