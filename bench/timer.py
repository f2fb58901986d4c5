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
    return {name: _timing(values, rounds) for name, values in samples.items()}


def race_on(device: str, contestants: Contestants, *, rounds: int = 11) -> dict[str, Timing]:
    """`race` where the calls' tensors are: "cpu", or "cuda" with the GPU's own clock."""
    return race(contestants, rounds=rounds) if device == "cpu" else race_on_gpu(contestants, rounds=rounds)


def race_on_gpu(contestants: Contestants, *, rounds: int = 51, seed: int = 0) -> dict[str, Timing]:
    """Times every contestant in every round by events on the GPU's stream, in a new order every round.

    The GPU first waits a moment, in which the host gets ahead: then there are no gaps between a call's kernels, as in a
    model that keeps the device busy.  Inputs are to be larger than the L2 cache, or what is timed is the cache.

    Args:
        contestants: name to a call without arguments.
        rounds: samples of each.
        seed: of the order.

    Returns:
        the timing of each contestant.
    """
    import torch

    for call in contestants.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
            start.record()
            contestants[name]()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: _timing(values, rounds) for name, values in samples.items()}


def _timing(samples: list[float], rounds: int) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Timing(median, lower, upper, rounds)


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
