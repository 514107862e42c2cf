"""Statistics of one site: what every strategy is fed with, gathered in one pass over the calibration data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from squamata.kernels.partition import Partition, gather

ALPHA = 0.9999  # quantile of |x| that percentile clipping keeps unless a recipe says otherwise


class Statistics:
    """Per group of a partition: smallest and largest value, and the ``alpha``-quantile of |x| of every sample.

    All float32, whatever the data; no quantiles if ``alpha`` is None. Memory: a few numbers a group, and one a group
    and sample for a quantile; nothing grows with the tokens.
    """

    def __init__(self, partition: Partition, alpha: float | None = None) -> None:
        self.partition = partition
        self.alpha = alpha
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.quantiles: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in a tensor (samples, ..., features) of any float type."""
        x = x.detach()
        shape = self.partition.shape()
        parts = self.partition.split(x)
        low = gather([part.amin(-1).float() for part in parts], shape)
        high = gather([part.amax(-1).float() for part in parts], shape)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if self.alpha is not None:
            for sample in x:
                parts = self.partition.split(sample)
                self.quantiles.append(gather([quantile(part.abs().float(), self.alpha) for part in parts], shape))

    def magnitude(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of every group."""
        if self.low is None or self.high is None:
            raise ValueError("no data was observed")
        return self.low, self.high


def quantile(x: Tensor, alpha: float) -> Tensor:
    """Exact alpha-quantile along the last axis with linear interpolation, for any number of elements.

    Agrees with ``torch.quantile``, which stops at 2^24 elements; sorts only the tail it needs.
    """
    position = alpha * (x.shape[-1] - 1)
    below = math.floor(position)
    tail = x.topk(x.shape[-1] - below, dim=-1).values  # descending; its last is element `below` of the sorted x
    lower, upper = tail[..., -1], tail[..., -2 if tail.shape[-1] > 1 else -1]
    return torch.lerp(lower, upper, position - below)
