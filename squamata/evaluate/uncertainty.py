"""How far a mean may be off: bootstrap intervals of token-weighted means, standard errors of accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
FEWEST_UNITS = 6  # fewer cannot show a difference at this level: all of five agree in sign with p = 2 / 2^5 > 0.05

Interval = tuple[float, float]


def ratio_interval(sums: np.ndarray, tokens: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """95 % percentile interval of ``sum(sums) / sum(tokens)`` when the units (n,) are drawn again with replacement.

    Percentile bootstrap (Efron & Tibshirani 1993, chapter 13). The same seed and number of units draw the same
    resamples, so intervals of two models are comparable. None for fewer than two units: one says nothing of the spread.
    """
    units = len(sums)
    if units < 2:
        return None
    generator = np.random.default_rng(seed)
    uniform = np.full(units, 1.0 / units)
    counts = (generator.multinomial(units, uniform) for _ in range(resamples))
    ratios = [float(count @ sums) / float(count @ tokens) for count in counts]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_and_error(hits: Sequence[bool]) -> tuple[float, float | None]:
    """Share of hits and its standard error, None for a single example."""
    count = len(hits)
    mean = sum(hits) / count
    return mean, math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
