"""The range with the least error: a grid of clip ratios (MSE; L2.4 norm as in PTQ4VM's search)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.kernels.codec import range_to_scale
from squamata.scales.error import mean_error
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.quant import QuantSpec

Grid = Annotated[int, Field(ge=2, le=10_000)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Power = Annotated[float, Field(gt=0.0, le=10.0)]


def lnorm(
    statistics: Statistics, spec: QuantSpec, p: Power = 2.4, grid: Grid = 100, smallest: Ratio = 0.05
) -> tuple[Tensor, Tensor | None]:
    """Of ``grid`` evenly spaced ratios from ``smallest`` to 1, that whose range (ratio low, ratio high) has the least
    mean |x - Q(x)|^p, chosen for every group by itself; the larger of two equal ones.
    """
    low, high = statistics.magnitude()
    best = torch.ones_like(low)
    least = torch.full(low.shape, torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(1.0, smallest, grid).tolist():
        error = mean_error(statistics, *range_to_scale(ratio * low, ratio * high, spec), spec, p).reshape(low.shape)
        best = torch.where(error < least, ratio, best)
        least = torch.minimum(error, least)
    return range_to_scale(best * low, best * high, spec)


def mse(
    statistics: Statistics, spec: QuantSpec, grid: Grid = 100, smallest: Ratio = 0.05
) -> tuple[Tensor, Tensor | None]:
    """``lnorm`` with p = 2: the least mean squared error."""
    return lnorm(statistics, spec, 2.0, grid, smallest)


def density_needs(spec: QuantSpec, **parameters: object) -> Needs:
    """Histogram and sample."""
    return Needs(histogram=True, sample=True)
