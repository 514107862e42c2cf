"""What a transform may know of a site: the range of every feature, and how large it is on average."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.partition import Partition
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec


class Observed(Statistics):
    """Smallest and largest value of every feature, and ``mean``: the largest over the samples of mean_t |x_t|."""

    def __init__(self, partition: Partition, spec: QuantSpec | None = None) -> None:
        super().__init__(partition)
        self.mean: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a tensor (samples, ..., features) of any float type."""
        super().update(x)
        means = x.detach().abs().float().reshape(len(x), -1, *self.partition.layout.sizes).mean(1).amax(0)
        self.mean = means if self.mean is None else torch.maximum(self.mean, means)
