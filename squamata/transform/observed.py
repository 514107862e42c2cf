"""What a transform may know of a site: the range of every feature, how large it is, and how features go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squamata.kernels.partition import Partition
from squamata.scales.gram import Gram
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.quant import QuantSpec


@dataclass(frozen=True)
class Basis:
    """Principal directions of what was seen: eigenvectors of its covariance, a column each; float64 (K, K)."""

    vectors: Tensor


class Observed(Statistics):
    """Smallest and largest value of every feature, and ``mean``: the largest over the samples of mean_t |x_t|.

    With ``pairs`` also what ``average`` and ``second_moments`` tell: 8 K^2 bytes for K features.
    """

    def __init__(self, partition: Partition, spec: QuantSpec | None = None, pairs: bool = False) -> None:
        super().__init__(partition, Needs(moments=pairs))
        self.mean: Tensor | None = None
        self.gram = Gram(partition.layout.flat_size) if pairs else None

    def update(self, x: Tensor) -> None:
        """Take in a tensor (samples, ..., features) of any float type."""
        super().update(x)
        means = x.detach().abs().float().reshape(len(x), -1, *self.partition.layout.sizes).mean(1).amax(0)
        self.mean = means if self.mean is None else torch.maximum(self.mean, means)
        if self.gram is not None:
            self.gram.update(x)

    def average(self) -> Tensor:
        """Mean |x| over all tokens, float64 (features,)."""
        assert self.moments is not None
        return self.moments.magnitude / self.moments.count

    def second_moments(self) -> Tensor:
        """Mean of x x^T over all tokens, float64 (features, features)."""
        assert self.gram is not None
        return self.gram.gram / self.gram.count

    def basis(self) -> Basis:
        """The features' principal directions, of the smallest variance first."""
        assert self.moments is not None
        mean = (self.moments.total / self.moments.count).flatten()
        return Basis(torch.linalg.eigh(self.second_moments() - torch.outer(mean, mean)).eigenvectors)
