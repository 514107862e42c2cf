"""The whole range: scale = max |x| / span."""

from __future__ import annotations

from torch import Tensor

from squamata.kernels.codec import range_to_scale
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec


def minmax(statistics: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale (and zero point) that represent the smallest and the largest value seen."""
    return range_to_scale(*statistics.magnitude(), spec)
