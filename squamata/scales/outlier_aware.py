"""Outlier-aware: most values use most codes, and the last codes are a margin for outliers before they are clipped."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.kernels.codec import range_to_scale
from squamata.scales.percentile import Alpha
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.quant import QuantSpec

QUANTILE = 0.99
MARGIN = 120 / 127  # share of the positive codes that the quantile uses

Level = Annotated[float, Field(gt=0)]


def outlier_aware(
    statistics: Statistics, spec: QuantSpec, quantile: Alpha = QUANTILE, level: Level | None = None
) -> tuple[Tensor, Tensor | None]:
    """scale = q / level, with q the ``quantile`` of |x|, averaged over the samples.

    ``level``: the code on which q lands, 120 of 127 at 8 bits unless given, and the same share at other widths. What
    is larger uses the codes above it and is clipped after the last. It may reach beyond the largest value seen; the
    ends of an asymmetric range do not.
    """
    ceiling = spec.span / (MARGIN * spec.span if level is None else level)
    reach = torch.stack(statistics.quantiles[quantile]).mean(0) * ceiling
    return range_to_scale(*((-reach, reach) if spec.symmetric else statistics.within(reach)), spec)


def outlier_aware_needs(spec: QuantSpec, quantile: float = QUANTILE, level: float | None = None) -> Needs:
    """Every sample's quantile."""
    return Needs(quantiles=(quantile,))
