"""Statistics of one site: what every strategy is fed with, gathered in one pass over the calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.partition import Partition, gather
from squamata.scales.histogram import Histogram
from squamata.scales.sample import Sample

ALPHA = 0.9999  # quantile of |x| that percentile clipping keeps unless a recipe says otherwise
NOT_FINITE = "values that are not finite: the weights are damaged, or the model overflows on the calibration text"


@dataclass(frozen=True)
class Needs:
    """What a strategy wants gathered beside smallest and largest value; what nobody wants costs nothing.

    ``quantiles``: of |x|, of every sample. ``moments``: sums of x, |x| and x^2. ``histogram`` and ``sample``: see
    there.
    """

    quantiles: tuple[float, ...] = ()
    moments: bool = False
    histogram: bool = False
    sample: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            tuple(dict.fromkeys(self.quantiles + other.quantiles)),
            self.moments or other.moments,
            self.histogram or other.histogram,
            self.sample or other.sample,
        )


@dataclass
class Moments:
    """Sums over a group's members, float64 (groups,): of x, of |x| and of x^2; ``count``: how many members."""

    count: Tensor
    total: Tensor
    magnitude: Tensor
    square: Tensor

    @classmethod
    def empty(cls, groups: int) -> Moments:
        return cls(*(torch.zeros(groups, dtype=torch.float64) for _ in range(4)))

    def update(self, parts: Sequence[Tensor]) -> None:
        """Add the members of every group, as ``Partition.split`` gives them."""
        exact = torch.float64
        self.count += torch.cat([torch.full((len(part),), float(part.shape[1]), dtype=exact) for part in parts])
        self.total += torch.cat([part.sum(1, dtype=exact) for part in parts])
        self.magnitude += torch.cat([part.abs().sum(1, dtype=exact) for part in parts])
        self.square += torch.cat([part.float().square().sum(1, dtype=exact) for part in parts])


class Statistics:
    """Per group of a partition: smallest and largest value, and what ``needs`` says.

    Memory: a few numbers a group; one a group, sample and quantile; a histogram and a sample of bounded size. Nothing
    grows with the tokens.
    """

    def __init__(self, partition: Partition, needs: Needs | None = None) -> None:
        self.partition = partition
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        needs = needs or Needs()
        groups = prod(partition.shape())
        self.quantiles: dict[float, list[Tensor]] = {alpha: [] for alpha in needs.quantiles}
        self.moments = Moments.empty(groups) if needs.moments else None
        self.histogram = Histogram(groups) if needs.histogram else None
        self.sample = Sample(groups) if needs.sample else None

    def update(self, x: Tensor) -> None:
        """Take in a tensor (samples, ..., features) of any float type; SquamataError if a value is not finite."""
        x = x.detach()
        shape = self.partition.shape()
        parts = self.partition.split(x)
        low = gather([part.amin(-1).float() for part in parts], shape)
        high = gather([part.amax(-1).float() for part in parts], shape)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise SquamataError(NOT_FINITE)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if self.moments is not None:
            self.moments.update(parts)
        if self.histogram is not None:
            self.histogram.update(parts, torch.maximum(low.abs(), high.abs()).reshape(-1))
        if self.sample is not None:
            self.sample.update(parts)
        if self.quantiles:
            parts = [part.abs().float() for part in self.partition.split_apart(x)]
            for alpha, found in self.quantiles.items():
                every = torch.cat([quantile(part, alpha) for part in parts], dim=1)  # (samples, groups)
                found += every.reshape(len(x), *shape).unbind()

    def magnitude(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of every group."""
        if self.low is None or self.high is None:
            raise ValueError("no data was observed")
        return self.low, self.high

    def within(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of every group, those beyond +-threshold (stored shape) cut off there."""
        low, high = self.magnitude()
        return torch.maximum(low, -threshold), torch.minimum(high, threshold)


def quantile(x: Tensor, alpha: float) -> Tensor:
    """Exact alpha-quantile along the last axis with linear interpolation, for any number of elements.

    Agrees with ``torch.quantile``, which stops at 2^24 elements; sorts only the tail it needs.
    """
    position = alpha * (x.shape[-1] - 1)
    below = math.floor(position)
    tail = x.topk(x.shape[-1] - below, dim=-1).values  # descending; its last is element `below` of the sorted x
    lower, upper = tail[..., -1], tail[..., -2 if tail.shape[-1] > 1 else -1]
    return torch.lerp(lower, upper, position - below)
