"""ACIQ (Banner et al. 2018, arXiv 1810.05723): the analytic optimum of clipping against rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from squamata.kernels.codec import range_to_scale
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.quant import QuantSpec

Distribution = Literal["gaussian", "laplace"]

LAPLACE_BELOW = math.sqrt(math.pi / (2 * math.e))  # E|x| / sqrt(E x^2) at which both fits are equally likely


def aciq(
    statistics: Statistics, spec: QuantSpec, distribution: Literal["fit", "gaussian", "laplace"] = "fit"
) -> tuple[Tensor, Tensor | None]:
    """Clip at the alpha that minimises clipping error plus step^2 / 12 of a Gaussian or Laplace distribution.

    ``fit`` takes for every group the likelier of the two, fitted by maximum likelihood: with b = E|x| and
    sigma^2 = E x^2, Laplace if b < sigma sqrt(pi / 2e). Symmetric formats take moments about zero, asymmetric ones
    about the mean. The range never exceeds what was seen.
    """
    shape = statistics.partition.shape()
    centre, deviation, spread = _moments(statistics, spec)
    steps = _half_range_in_steps(spec)
    gaussian = optimal_clip("gaussian", steps) * spread
    laplace = optimal_clip("laplace", steps) * deviation
    choices = {"gaussian": gaussian, "laplace": laplace}
    reach = choices.get(distribution, torch.where(deviation < LAPLACE_BELOW * spread, laplace, gaussian))
    low, high = statistics.magnitude()
    ends = ((centre - reach).float().reshape(shape), (centre + reach).float().reshape(shape))
    return range_to_scale(torch.maximum(low, ends[0]), torch.minimum(high, ends[1]), spec)


def aciq_needs(spec: QuantSpec, **parameters: object) -> Needs:
    """Moments; for deviations from the mean, which one pass cannot add up, a histogram."""
    return Needs(moments=True, histogram=not spec.symmetric)


def _moments(statistics: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, mean absolute and root mean square deviation from it, float64 (groups,)."""
    moments, histogram = statistics.moments, statistics.histogram
    assert moments is not None
    square = moments.square / moments.count
    if spec.symmetric:
        return torch.zeros_like(square), moments.magnitude / moments.count, square.sqrt()
    assert histogram is not None
    centre = moments.total / moments.count
    distances = (histogram.centres() - centre[:, None]).abs() * histogram.counts
    return centre, distances.sum(1) / moments.count, (square - centre.square()).clamp_min(0).sqrt()


def _half_range_in_steps(spec: QuantSpec) -> float:
    smallest, largest = spec.code_range
    return spec.span if spec.symmetric else (largest - smallest) / 2


@cache
def optimal_clip(distribution: Distribution, steps: float) -> float:
    """The alpha that minimises ``clipping_error`` + (alpha / steps)^2 / 12, in units of b or sigma.

    ``steps``: how many steps alpha spans; the paper has 2^(bits - 1), a symmetric grid -Q..Q has Q. The root of the
    derivative, which rises through zero once, by bisection.
    """

    def slope(alpha: float) -> float:
        return _clipping_slopes[distribution](alpha) + alpha / (6 * steps**2)

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def clipping_error(distribution: Distribution, alpha: float) -> float:
    """2 integral from alpha to infinity of (x - alpha)^2 f(x) dx, for b = 1 or sigma = 1 (equations 8 and A.5)."""
    if distribution == "laplace":
        return 2 * math.exp(-alpha)
    tail = math.erfc(alpha / math.sqrt(2))
    return (alpha**2 + 1) * tail - alpha * math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2)


_clipping_slopes: dict[Distribution, Callable[[float], float]] = {
    "laplace": lambda alpha: -2 * math.exp(-alpha),
    "gaussian": lambda alpha: (
        2 * (alpha * math.erfc(alpha / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2))
    ),
}
