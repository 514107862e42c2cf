"""How far a mean may be off: bootstrap intervals of token-weighted means, standard errors of accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_UNITS = 6  # fewer cannot show a difference at this level: all of five agree in sign with p = 2 / 2^5 > 0.05
COUNTS_AT_ONCE = 2**22  # of resamples, 32 MiB

Interval = tuple[float, float]


def ratio_interval(sums: np.ndarray, tokens: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """95 % interval of ``sum(sums) / sum(tokens)`` by drawing the units (n,) again with replacement.

    Percentile bootstrap (Efron & Tibshirani 1993, chapter 13), expanded for few units (Hesterberg 2015, arXiv
    1411.5279, 'expanded percentile interval'): the plain one of seven documents holds the truth 85 times in 100.
    The same seed and number of units draw the same resamples, so intervals of two models are comparable. None for
    fewer than two units: one says nothing of the spread.
    """
    units = len(sums)
    if units < 2:
        return None
    generator = np.random.default_rng(seed)
    uniform = np.full(units, 1.0 / units)
    most = max(1, COUNTS_AT_ONCE // units)
    ratios = []
    for start in range(0, resamples, most):
        counts = generator.multinomial(units, uniform, size=min(most, resamples - start))
        ratios.append((counts @ sums) / (counts @ tokens))
    beyond = tail(units)
    low, high = np.quantile(np.concatenate(ratios), [beyond, 1 - beyond])
    return float(low), float(high)


def tail(units: int) -> float:
    """Share of the resamples of so many units that lie beyond either end of the interval.

    The spread of resamples is too small by sqrt((n - 1) / n), and itself an estimate of n - 1 degrees of freedom: where
    the quantiles of a normal would be +-1.96, they are taken at +-sqrt(n / (n - 1)) t. For many units this is 0.025.
    """
    normal = NormalDist()
    z, freedom = normal.inv_cdf((1 + LEVEL) / 2), units - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)  # Abramowitz & Stegun 26.7.5
    return normal.cdf(-t * math.sqrt(units / freedom))


def mean_and_error(hits: Sequence[bool]) -> tuple[float, float | None]:
    """Share of hits and its standard error, None for a single example."""
    count = len(hits)
    mean = sum(hits) / count
    return mean, math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
