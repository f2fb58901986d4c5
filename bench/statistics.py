"""What samples say: quartiles, and how sure a ratio of two medians is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

# Of the resampling: the same samples give the same interval.
RESAMPLES, SEED = 2000, 0


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of one sample three times itself."""
    # Weibull's, as `statistics.quantiles` of the standard library has them.
    lower, median, upper = np.quantile(np.asarray(samples, np.float64), (0.25, 0.5, 0.75), method="weibull")
    return float(lower), float(median), float(upper)


def _ratios(over: Sequence[float], under: Sequence[float], together: bool) -> np.ndarray:
    """Ratios of medians of the samples drawn again, `[RESAMPLES]`."""
    generator = np.random.default_rng(SEED)
    a, b = np.asarray(over, np.float64), np.asarray(under, np.float64)
    first = generator.integers(len(a), size=(RESAMPLES, len(a)))
    second = first if together else generator.integers(len(b), size=(RESAMPLES, len(b)))
    return np.median(a[first], axis=1) / np.median(b[second], axis=1)


def interval(over: Sequence[float], under: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The bootstrap interval of the median of `over` divided by that of `under`.

    Args:
        over, under: seconds.  As many of both are those of one race, in the order of its rounds: what a round had in
            common, as a slow machine, is drawn together.
        confidence: of the interval.

    Returns:
        Its ends, or None where there are fewer than three samples of either.
    """
    return _interval(tuple(over), tuple(under), confidence) if min(len(over), len(under)) >= 3 else None


@cache
def _interval(over: tuple[float, ...], under: tuple[float, ...], confidence: float) -> tuple[float, float]:
    """Remembered: a page shows an interval in several places, and is written more than once."""
    found = _ratios(over, under, together=len(over) == len(under))
    low, high = np.quantile(found, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def deviation(over: Sequence[float], under: Sequence[float]) -> float:
    """The standard deviation of the logarithm of the ratio of medians, of two races that were not one."""
    return float(np.log(_ratios(over, under, together=False)).std())


def quantile_of_normal(probability: float) -> float:
    """The number that a standard normal one is below with this probability."""
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2
