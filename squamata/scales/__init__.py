"""Scale strategies: statistics x spec -> scale (and the codec's second number).

One short file each; adding one is one entry here.

A strategy's further parameters are what a recipe may set; their annotations say which values are legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squamata.errors import SquamataError, nearest
from squamata.kernels.codec import CODECS
from squamata.kernels.partition import Partition
from squamata.scales.minmax import minmax
from squamata.scales.percentile import percentile
from squamata.scales.statistics import ALPHA, Statistics
from squamata.spec.parameters import checked_parameters
from squamata.spec.quant import QuantSpec

OWN_ARGUMENTS = 2  # statistics, spec: what a recipe does not set


@dataclass(frozen=True)
class Strategy:
    """``function(statistics, spec, **parameters) -> scale, second`` (the codec's second number a group: a zero point).

    ``quantile``: it wants every sample's quantile of |x|, at its parameter ``alpha``, beside smallest and largest.
    """

    function: Callable[..., tuple[Tensor, Tensor | None]]
    quantile: bool = False


STRATEGIES: dict[str, Strategy] = {"minmax": Strategy(minmax), "percentile": Strategy(percentile, quantile=True)}


def check(spec: QuantSpec, where: str) -> None:
    """Refuse an unknown strategy or parameter, naming the nearest; for recipes, before any work is done."""
    name = spec.scale.strategy
    if name not in STRATEGIES:
        raise SquamataError(f"{where}: no scale strategy named '{name}'{nearest(name, STRATEGIES)}")
    _parameters(spec, f"{where}: {name}")


def gather_for(partition: Partition, spec: QuantSpec) -> Statistics:
    """Empty statistics that will gather what the spec's strategy needs."""
    quantile = STRATEGIES[spec.scale.strategy].quantile
    return Statistics(partition, spec.scale.parameters.get("alpha", ALPHA) if quantile else None)


def compute(statistics: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and second number in the partition's stored form, in the precision in which they are stored.

    SquamataError for a scale that this precision cannot hold.
    """
    name = spec.scale.strategy
    scale, second = STRATEGIES[name].function(statistics, spec, **_parameters(spec, name))
    if spec.scale_dtype == "float16":
        largest = torch.finfo(torch.float16).max
        if bool((scale > largest).any()):
            problem = f"a scale of {float(scale.max()):.4g} is beyond float16, which ends at {largest:.0f}"
            raise SquamataError(f"{problem}; use 'scale_dtype: float32' or a finer granularity")
        scale = scale.half().float().clamp_min(2.0**-24)
    if (fit := CODECS[spec.codec].fit) is not None:  # the strategy's range is the threshold, the whole one the tail's
        low, high = statistics.magnitude()
        second = fit(scale, torch.maximum(low.abs(), high.abs()), spec)
    return scale, second


def _parameters(spec: QuantSpec, where: str) -> dict[str, object]:
    return checked_parameters(STRATEGIES[spec.scale.strategy].function, spec.scale.parameters, OWN_ARGUMENTS, where)
