"""Scale strategies: statistics x spec -> scale (and zero point). One short file each; adding one is one entry here.

A strategy's further parameters are what a recipe may set; their annotations say which values are legal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from squamata.errors import SquamataError, nearest
from squamata.scales.minmax import minmax
from squamata.scales.percentile import percentile
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec

Strategy = Callable[..., tuple[Tensor, Tensor | None]]

STRATEGIES: dict[str, Strategy] = {"minmax": minmax, "percentile": percentile}


def check(spec: QuantSpec, where: str) -> None:
    """Refuse an unknown strategy or parameter, naming the nearest; for recipes, before any work is done."""
    name, parameters = spec.scale.strategy, spec.scale.parameters
    if name not in STRATEGIES:
        raise SquamataError(f"{where}: no scale strategy named '{name}'{nearest(name, STRATEGIES)}")
    types = get_type_hints(STRATEGIES[name], include_extras=True)
    known = list(inspect.signature(STRATEGIES[name]).parameters)[2:]
    for key, value in parameters.items():
        if key not in known:
            raise SquamataError(f"{where}: {name} has no parameter '{key}'{nearest(key, known)}")
        try:
            TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise SquamataError(f"{where}: {name} with {key} {value}: {error.errors()[0]['msg']}") from None


def compute(statistics: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point in the partition's stored form, in the precision in which they are stored."""
    scale, zero = STRATEGIES[spec.scale.strategy](statistics, spec, **spec.scale.parameters)
    if spec.scale_dtype == "float16":
        scale = scale.half().float().clamp_min(2.0**-24)
    return scale, zero
