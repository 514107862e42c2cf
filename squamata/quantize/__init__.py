"""Weight quantizers: a layer's float tensors -> integers. One file each; adding one is one entry here.

A quantizer is ``(tensor, spec, layout, statistics, **parameters) -> QTensor``. ``statistics``: the Gram matrix of what
the weight multiplies, or what was found in the whole model beforehand, for a quantizer that asks for it, else None. Its
further parameters are what a recipe may set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from squamata.errors import SquamataError, about, nearest
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value
from squamata.quantize.adaround import adaround
from squamata.quantize.gptq import gptq
from squamata.quantize.rtn import round_to_nearest
from squamata.quantize.second_level import with_second_level
from squamata.quantize.squeezellm import Sensitivity, sensitivities, squeezellm
from squamata.scales.gram import Gram
from squamata.spec.parameters import checked_parameters
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe


@dataclass(frozen=True)
class Quantizer:
    """``inputs``: it must see what a weight multiplies. Such a one is for products; all other tensors, and weights
    whose inputs nobody sees (the embedding), are rounded to nearest. ``tables``: it finds the levels of weights with
    codec ``table``, as which it must see the whole model first (``of_whole``), and its gradients unless told otherwise.
    """

    function: Callable[..., QTensor]
    inputs: bool = False
    tables: bool = False


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": Quantizer(round_to_nearest),
    "gptq": Quantizer(gptq, inputs=True),
    "adaround": Quantizer(adaround, inputs=True),
    "squeezellm": Quantizer(squeezellm, tables=True),
}

OWN_ARGUMENTS = 4  # tensor, spec, layout, statistics: what a recipe does not set


Statistics = Gram | Sensitivity


def check(recipe: Recipe) -> None:
    """Refuse an unknown weight quantizer or parameter, naming the nearest, and a table that nothing can fill."""
    name = recipe.weights.name
    if name not in QUANTIZERS:
        raise SquamataError(f"recipe {recipe.name}: no weight quantizer named '{name}'{nearest(name, QUANTIZERS)}")
    _parameters(recipe)
    if any(rule.spec is not None and rule.spec.tabulated for rule in recipe.rules):
        finders = [finder for finder, quantizer in QUANTIZERS.items() if quantizer.tables]
        if name not in finders:
            raise SquamataError(f"recipe {recipe.name}: {name} finds no tables; use 'weights: {finders[0]}'")
        if recipe.transforms:
            problem = f"tables are found in the model as it came, before '{recipe.transforms[0].name}' changes it"
            raise SquamataError(f"recipe {recipe.name}: {problem}: leave the transforms out")


def needs_gradients(recipe: Recipe) -> bool:
    """True if the recipe's weight quantizer must see gradients of the loss with respect to the weights."""
    return QUANTIZERS[recipe.weights.name].tables and _parameters(recipe).get("fisher") is not False


def of_whole(
    recipe: Recipe,
    weights: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    squares: Mapping[str, Tensor] | None,
) -> dict[str, Sensitivity]:
    """What must be known of all these weights with tables before the first is quantized. ``squares``: mean squared
    gradients, if the recipe needs them.
    """
    return sensitivities(weights, specs, squares, **_parameters(recipe))  # type: ignore[arg-type]


def needs_inputs(recipe: Recipe) -> bool:
    """True if the recipe's weight quantizer must see what the weights multiply."""
    return QUANTIZERS[recipe.weights.name].inputs


def _parameters(recipe: Recipe) -> dict[str, object]:
    name, given = recipe.weights.name, recipe.weights.parameters
    return checked_parameters(QUANTIZERS[name].function, given, OWN_ARGUMENTS, f"weight quantizer {name}")


def quantize_tensors(
    recipe: Recipe,
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    layouts: Mapping[str, Layout],
    statistics: Mapping[str, Statistics] | None = None,
) -> dict[str, Value]:
    """Every tensor that has a spec becomes a QTensor; the rest stay as they are. SquamataErrors name the tensor.

    ``statistics``: by the weight's name, for a quantizer that asks for them.
    """
    chosen, parameters = QUANTIZERS[recipe.weights.name], _parameters(recipe)
    quantized: dict[str, Value] = {}
    for name, tensor in tensors.items():
        spec = specs.get(name)
        if spec is None or not torch.is_floating_point(tensor):
            quantized[name] = tensor
            continue
        seen = (statistics or {}).get(name)
        one_level = spec.model_copy(update={"second_level": False})
        with about(name):
            if chosen.inputs and seen is None:
                value = round_to_nearest(tensor, one_level, layouts[name])
            else:
                value = chosen.function(tensor, one_level, layouts[name], seen, **parameters)
            quantized[name] = with_second_level(value, spec) if spec.second_level else value
    return quantized
