"""Percentile clipping: the alpha-quantile of |x| becomes the largest representable value (Quamba, section 4.2)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.kernels.codec import range_to_scale
from squamata.scales.statistics import ALPHA, Statistics
from squamata.spec.quant import QuantSpec

Alpha = Annotated[float, Field(ge=0.5, le=1.0)]
Sigma = Annotated[float, Field(gt=0.0, le=1.0)]


def percentile(
    statistics: Statistics, spec: QuantSpec, alpha: Alpha = ALPHA, ema: Sigma | None = None
) -> tuple[Tensor, Tensor | None]:
    """Combine the samples' quantiles: their mean, or with ``ema`` = sigma the moving average
    w <- w + sigma (c - w) that starts at the first sample (upstream: sigma 0.01, which forgets the first slowly).

    The moving average depends on the order, which is the batch order: short samples first, those of one length in the
    order in which they were drawn.
    """
    threshold = statistics.quantiles[0]
    if ema is None:
        threshold = torch.stack(statistics.quantiles).mean(0)
    else:
        for sample in statistics.quantiles[1:]:
            threshold = threshold + ema * (sample - threshold)
    low, high = statistics.magnitude()
    return range_to_scale(torch.maximum(low, -threshold), torch.minimum(high, threshold), spec)
