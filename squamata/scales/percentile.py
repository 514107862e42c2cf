"""Percentile clipping: the alpha-quantile of |x| becomes the largest representable value (Quamba, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.codec import range_to_scale
from squamata.scales.statistics import ALPHA, Needs, Statistics
from squamata.spec.quant import QuantSpec

Alpha = Annotated[float, Field(ge=0.5, le=1.0)]
Sigma = Annotated[float, Field(gt=0.0, le=1.0)]
WarmUp = dict[Annotated[int, Field(ge=1)], Sigma]


def percentile(
    statistics: Statistics,
    spec: QuantSpec,
    alpha: Alpha = ALPHA,
    ema: Sigma | None = None,
    warmup: WarmUp | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Combine the samples' quantiles: their mean, or with ``ema`` = sigma the moving average
    w <- w + sigma (c - w) that starts at the first sample (upstream: sigma 0.01, which forgets the first slowly).

    ``warmup``: {50: 0.5, 200: 0.2} takes sigma 0.5 for the first 50 samples, 0.2 until the 200th, ``ema`` from there
    on. The moving average depends on the order, which is the batch order: short samples first, those of one length in
    the order in which they were drawn. A state is seen every 64 tokens, and each time counts as a sample.
    """
    samples = statistics.quantiles[alpha]
    threshold = torch.stack(samples).mean(0) if ema is None else moving_average(samples, ema, warmup or {})
    return range_to_scale(*statistics.within(threshold), spec)


def percentile_needs(
    spec: QuantSpec, alpha: float = ALPHA, ema: float | None = None, warmup: WarmUp | None = None
) -> Needs:
    """Every sample's alpha-quantile; SquamataError for a warm-up of nothing."""
    if warmup and ema is None:
        raise SquamataError("'warmup' is a warm-up of the moving average: give 'ema' as well")
    return Needs(quantiles=(alpha,))


def moving_average(samples: Sequence[Tensor], sigma: float, warmup: Mapping[int, float]) -> Tensor:
    """w <- w + sigma (c - w), from w = the first sample; ``warmup`` says which sigma holds until which sample."""
    average = samples[0]
    for number, sample in enumerate(samples[1:], start=2):
        ends = [end for end in warmup if number <= end]
        average = average + (warmup[min(ends)] if ends else sigma) * (sample - average)
    return average
