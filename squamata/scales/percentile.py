"""Percentile clipping: the alpha-quantile of |x| becomes the largest representable value (Quamba, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.site import range_to_scale
from squamata.scales.statistics import ALPHA, Statistics
from squamata.spec.quant import QuantSpec


def percentile(
    statistics: Statistics, spec: QuantSpec, alpha: float = ALPHA, ema: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Combine the samples' quantiles: their mean, or with ``ema`` = sigma the moving average
    w <- w + sigma (c - w) that starts at the first sample (upstream: sigma 0.01, which forgets the first slowly)."""
    if not 0.5 <= alpha <= 1.0 or (ema is not None and not 0.0 < ema <= 1.0):
        raise SquamataError(f"percentile: alpha is in 0.5..1 and ema in 0..1, not {alpha} and {ema}")
    threshold = statistics.quantiles[0]
    if ema is None:
        threshold = torch.stack(statistics.quantiles).mean(0)
    else:
        for sample in statistics.quantiles[1:]:
            threshold = threshold + ema * (sample - threshold)
    low, high = statistics.magnitude()
    return range_to_scale(torch.maximum(low, -threshold), torch.minimum(high, threshold), spec)
