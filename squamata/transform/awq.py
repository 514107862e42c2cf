"""Activation-aware weight quantization: what large channels multiply is rounded finer (AWQ, arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from squamata import scales
from squamata.kernels.codec import Grid
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import encode
from squamata.models.config import ModelConfig
from squamata.spec.quant import QuantSpec
from squamata.transform.folds import Product, folds
from squamata.transform.observed import Observed

SMALLEST = 1e-4  # of a factor before it is normalized, as in AWQ's code
SHRINKS = 20  # clipping tries a range of 1, 19/20, ... 11/20 of the largest weight, as AWQ's code

INPUTS: dict[Product | Literal["x_proj"], str] = {"in_proj": "in", "x_proj": "u", "out_proj": "out"}  # the sites read


def awq(
    config: ModelConfig,
    kind: str,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Observed],
    spec: Annotated[QuantSpec, AfterValidator(_searchable)],
    steps: Annotated[int, Field(ge=1)] = 20,
    clip: bool = True,
) -> dict[str, Tensor]:
    """x <- x / s, W <- W diag(s), s_j = (mean |x_j|)^r / sqrt(max max min), r the best of k / ``steps``; then clipping.

    ``spec``: how the weights will be rounded; of two levels of scales the searches look at the first. Both minimize the
    squared error of the projection's own output over the calibration tokens; AWQ's first looks at a block's output
    where several projections share an input. Scaled is what ``folds`` folds: in_proj and a Mamba-2's out_proj.
    ``clip``: the weights of each group are cut off where that rounds them best, also in the projections that cannot be
    scaled; the model is then no longer equal. Needs a few float64 (K, K) and copies of one weight (out, K).
    """
    changed = dict(tensors)
    for product, site in INPUTS.items():
        name = f"mixer.{product}.weight"
        if name not in changed:
            continue
        moments = statistics[f"mixer.{site}"].second_moments()
        for fold in folds(config, kind, changed, product) if product != "x_proj" else ():
            factors = best_factors(changed[name], statistics[f"mixer.{site}"].average(), moments, spec, steps)
            changed = fold.apply(changed, factors)
            moments = moments / factors[:, None] / factors
        if clip:
            changed[name] = clipped(changed[name], moments, spec)
    return changed


def best_factors(weight: Tensor, average: Tensor, moments: Tensor, spec: QuantSpec, steps: int) -> Tensor:
    """s (K,), float64, that lets rounding W diag(s) (out, K) change W x least, for ``average`` |x| (K,) and
    ``moments`` E[x x^T] (K, K).
    """
    best, least = torch.ones_like(average), float("inf")
    for step in range(steps):
        factors = (average ** (step / steps)).clamp_min(SMALLEST)
        factors = factors / (factors.max() * factors.min()).sqrt()
        change = rounded(weight * factors, spec) / factors - weight
        error = float(output_error(change, moments).sum())
        if error < least:
            best, least = factors, error
    return best


def clipped(weight: Tensor, moments: Tensor, spec: QuantSpec) -> Tensor:
    """The weight (out, K) with every group of every row cut off at the largest magnitude that serves W x best."""
    width = min(spec.granularity.group or weight.shape[1], weight.shape[1])
    parts = []
    for start in range(0, weight.shape[1], width):
        inside = slice(start, start + width)
        part, own = weight[:, inside], moments[inside, inside]
        largest, best = part.abs().amax(1, keepdim=True), part
        least = torch.full_like(largest, torch.inf, dtype=torch.float64)
        for step in range(SHRINKS // 2):
            limit = largest * (1 - step / SHRINKS)
            cut = part.clamp(-limit, limit)
            error = output_error(rounded(cut, spec) - part, own)[:, None]
            best = torch.where(error < least, cut, best)
            least = torch.minimum(error, least)
        parts.append(best)
    return torch.cat(parts, 1)


def output_error(change: Tensor, moments: Tensor) -> Tensor:
    """E[((W' - W) x)^2] of every row of the change (out, K), float64 (out,), from E[x x^T] (K, K)."""
    change = change.float()
    return ((change @ moments.float()) * change).sum(1, dtype=torch.float64)


def rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The weight (out, K) as plain rounding to nearest stores it."""
    partition = Partition(spec.granularity, Layout(("out", "in"), tuple(weight.shape), flat=False))
    statistics = scales.gather_for(partition, spec)
    statistics.update(weight[None])
    parts = (None if one is None else partition.expand(one) for one in scales.compute(statistics, spec))
    scale, second = (None if one is None else QTensor(weight, one, spec).element_scale() for one in parts)
    assert scale is not None
    return encode(weight.float(), Grid.of(scale, second), spec).dequantize()


def _searchable(spec: QuantSpec) -> QuantSpec:
    """The first level of a spec that ``rounded`` knows how to round to; ValueError for another."""
    if spec.codec != "uniform" or spec.dynamic or spec.rounding == "stochastic":
        raise ValueError("weights of products are on uniform grids: leave 'codec', 'dynamic' and 'rounding' out")
    if spec.keep is not None:
        raise ValueError("its search knows no kept channels: leave 'keep' out")
    if not set(spec.granularity.axes) <= {"out", "channel"}:
        raise ValueError(f"its search knows no scales per {spec.granularity}: use tensor, channel or group(N)")
    scales.check(spec, "transform awq: spec")
    return spec.model_copy(update={"second_level": False})
