"""Weight quantizers: a layer's float tensors -> integers. One file each; adding one is one entry here.

A quantizer is ``(tensor, spec, layout, statistics, **parameters) -> QTensor``. ``statistics``: of the values that the
weight multiplies, or None where they were not observed (the pipeline observes none so far). Its further parameters are
what a recipe may set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from squamata.errors import SquamataError, about, nearest
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value
from squamata.quantize.adaround import adaround
from squamata.quantize.rtn import round_to_nearest
from squamata.spec.parameters import checked_parameters
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

Quantizer = Callable[..., QTensor]

QUANTIZERS: dict[str, Quantizer] = {"rtn": round_to_nearest, "adaround": adaround}

OWN_ARGUMENTS = 4  # tensor, spec, layout, statistics: what a recipe does not set


def check(recipe: Recipe) -> None:
    """Refuse an unknown weight quantizer or parameter, naming the nearest."""
    name = recipe.weights.name
    if name not in QUANTIZERS:
        raise SquamataError(f"recipe {recipe.name}: no weight quantizer named '{name}'{nearest(name, QUANTIZERS)}")
    _parameters(recipe)


def _parameters(recipe: Recipe) -> dict[str, object]:
    name, given = recipe.weights.name, recipe.weights.parameters
    return checked_parameters(QUANTIZERS[name], given, OWN_ARGUMENTS, f"weight quantizer {name}")


def quantize_tensors(
    recipe: Recipe, tensors: Mapping[str, Tensor], specs: Mapping[str, QuantSpec], layouts: Mapping[str, Layout]
) -> dict[str, Value]:
    """Every tensor that has a spec becomes a QTensor; the rest stay as they are. SquamataErrors name the tensor."""
    quantizer = QUANTIZERS[recipe.weights.name]
    parameters = _parameters(recipe)
    quantized: dict[str, Value] = {}
    for name, tensor in tensors.items():
        spec = specs.get(name)
        if spec is None or not torch.is_floating_point(tensor):
            quantized[name] = tensor
        else:
            with about(name):
                quantized[name] = quantizer(tensor, spec, layouts[name], None, **parameters)
    return quantized
