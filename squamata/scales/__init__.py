"""Scale strategies: statistics x spec -> scale (and the codec's second number).

One short file each; adding one is one entry here.

A strategy's further parameters are what a recipe may set; their annotations say which values are legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from inspect import signature
from operator import or_
from typing import Any, Literal

import torch
from torch import Tensor

from squamata.errors import SquamataError, about, nearest
from squamata.kernels.partition import Partition
from squamata.scales.aciq import aciq, aciq_needs
from squamata.scales.entropy import entropy, entropy_needs
from squamata.scales.error import information_lost, mean_error, second_number
from squamata.scales.lnorm import density_needs, lnorm, mse
from squamata.scales.minmax import minmax
from squamata.scales.outlier_aware import outlier_aware, outlier_aware_needs
from squamata.scales.percentile import percentile, percentile_needs
from squamata.scales.search import Over, expanded
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.parameters import checked_parameters
from squamata.spec.quant import QuantSpec, ScaleSpec

By = Literal["mse", "codes", "kl"]

OWN_ARGUMENTS = 2  # statistics, spec: what a recipe does not set

Scale = tuple[Tensor, Tensor | None]  # scale and zero point or other second number, in the partition's stored form


def _nothing(spec: QuantSpec) -> Needs:
    return Needs()


@dataclass(frozen=True)
class Strategy:
    """``function(statistics, spec, **parameters) -> scale, second`` (the codec's second number a group: a zero point).

    ``needs(spec, **parameters)``: what it wants gathered beside smallest and largest value; SquamataError for
    parameters that do not go together.
    """

    function: Callable[..., Scale]
    needs: Callable[..., Needs] = _nothing


def search(
    statistics: Statistics,
    spec: QuantSpec,
    candidates: list[ScaleSpec] | None = None,
    over: Over | None = None,
    by: By = "mse",
) -> Scale:
    """The best of several strategies at this site, one for all its groups; the first of equally good ones.

    ``{search: [percentile, mse], over: {alpha: [0.999, 0.9999]}, by: mse}``: ``over`` gives the strategies' parameters
    several values each, or is the list of strategies, as a recipe writes them. ``by``: what counts. At the site itself:
    ``mse``, the squared error of its values; ``codes``, the information about them that their codes lose
    (``error.information_lost``). At the model's output: ``kl``, KL(float || quantized) of its logits, which a second
    pass sees (``calibrate.whole``); until then it is the choice by ``mse``.
    """
    cost = information_lost if by == "codes" else mean_error
    found = [_find(statistics, one) for one in _candidate_specs(spec, candidates, over)]
    assert statistics.histogram is not None
    weights = statistics.histogram.counts.sum(1).double()
    costs = [float((cost(statistics, scale, zero, spec) * weights).sum()) for scale, zero in found]
    return found[costs.index(min(costs))]


def _search_needs(
    spec: QuantSpec, candidates: list[ScaleSpec] | None = None, over: Over | None = None, by: str = "mse"
) -> Needs:
    each = [_needs(one, "over") for one in _candidate_specs(spec, candidates, over)]
    return reduce(or_, each, density_needs(spec))


def _candidate_specs(spec: QuantSpec, candidates: list[ScaleSpec] | None, over: Over | None) -> list[QuantSpec]:
    known = {name: list(signature(one.function).parameters)[OWN_ARGUMENTS:] for name, one in STRATEGIES.items()}
    return [spec.model_copy(update={"scale": one}) for one in expanded(candidates, over, known)]


def searched_by_output(spec: QuantSpec) -> bool:
    """True if the scale is chosen by what the model's output loses."""
    return spec.scale.strategy == "search" and spec.scale.parameters.get("by") == "kl"


def choices(statistics: Statistics, spec: QuantSpec) -> list[Scale]:
    """What every candidate of the spec's search makes of a site, as ``compute`` gives it."""
    parameters = _parameters(spec, spec.scale.strategy)
    specs = _candidate_specs(spec, parameters.get("candidates"), parameters.get("over"))
    return [compute(statistics, one) for one in specs]


STRATEGIES: dict[str, Strategy] = {
    "minmax": Strategy(minmax),
    "percentile": Strategy(percentile, percentile_needs),
    "mse": Strategy(mse, density_needs),
    "lnorm": Strategy(lnorm, density_needs),
    "aciq": Strategy(aciq, aciq_needs),
    "entropy": Strategy(entropy, entropy_needs),
    "outlier_aware": Strategy(outlier_aware, outlier_aware_needs),
    "search": Strategy(search, _search_needs),
}


def check(spec: QuantSpec, where: str) -> None:
    """Refuse an unknown strategy or parameter, naming the nearest; for recipes, before any work is done."""
    _needs(spec, where)


def gather_for(partition: Partition, spec: QuantSpec) -> Statistics:
    """Empty statistics that will gather what the spec's strategy needs."""
    return Statistics(partition, _needs(spec, spec.scale.strategy))


def compute(statistics: Statistics, spec: QuantSpec) -> Scale:
    """Scale and second number in the partition's stored form, in the precision in which they are stored.

    SquamataError for a scale that this precision cannot hold.
    """
    scale, zero = _find(statistics, spec)
    scale = as_stored(scale, spec)
    return scale, second_number(statistics, scale, zero, spec)


def as_stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale as the spec's ``scale_dtype`` holds it, in float32; SquamataError for one beyond its range."""
    if spec.scale_dtype == "float16":
        largest = torch.finfo(torch.float16).max
        if bool((scale > largest).any()):
            problem = f"a scale of {float(scale.max()):.4g} is beyond float16, which ends at {largest:.0f}"
            raise SquamataError(f"{problem}; use 'scale_dtype: float32' or a finer granularity")
        scale = scale.half().float().clamp_min(2.0**-24)
    return scale


def _find(statistics: Statistics, spec: QuantSpec) -> Scale:
    if spec.absolute:
        return torch.ones(statistics.partition.shape()), None
    name = spec.scale.strategy
    return STRATEGIES[name].function(statistics, spec, **_parameters(spec, name))


def _needs(spec: QuantSpec, where: str) -> Needs:
    """What the spec's strategy wants gathered; SquamataErrors begin with ``where``."""
    name = spec.scale.strategy
    if name not in STRATEGIES:
        raise SquamataError(f"{where}: no scale strategy named '{name}'{nearest(name, STRATEGIES)}")
    parameters = _parameters(spec, f"{where}: {name}")
    with about(where):
        return STRATEGIES[name].needs(spec, **parameters)


def _parameters(spec: QuantSpec, where: str) -> dict[str, Any]:
    return checked_parameters(STRATEGIES[spec.scale.strategy].function, spec.scale.parameters, OWN_ARGUMENTS, where)
