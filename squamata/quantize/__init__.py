"""Weight quantizers: a layer's float tensors -> integers. One file each; adding one is one entry here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from squamata.errors import SquamataError, nearest
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value
from squamata.quantize.rtn import round_to_nearest
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

Quantizer = Callable[..., QTensor]

QUANTIZERS: dict[str, Quantizer] = {"rtn": round_to_nearest}


def check(recipe: Recipe) -> None:
    """Refuse an unknown weight quantizer or parameter, naming the nearest."""
    name = recipe.weights.name
    if name not in QUANTIZERS:
        raise SquamataError(f"recipe {recipe.name}: no weight quantizer named '{name}'{nearest(name, QUANTIZERS)}")
    known = list(inspect.signature(QUANTIZERS[name]).parameters)[3:]
    for key in recipe.weights.parameters:
        if key not in known:
            raise SquamataError(f"weight quantizer {name}: no parameter '{key}'{nearest(key, known)}")


def quantize_tensors(
    recipe: Recipe, tensors: Mapping[str, Tensor], specs: Mapping[str, QuantSpec], layouts: Mapping[str, Layout]
) -> dict[str, Value]:
    """Every tensor that has a spec becomes a QTensor; the rest stay as they are."""
    quantizer = QUANTIZERS[recipe.weights.name]
    parameters = recipe.weights.parameters
    quantized: dict[str, Value] = {}
    for name, tensor in tensors.items():
        spec = specs.get(name)
        if spec is None or not torch.is_floating_point(tensor):
            quantized[name] = tensor
        else:
            quantized[name] = quantizer(tensor, spec, layouts[name], **parameters)
    return quantized
