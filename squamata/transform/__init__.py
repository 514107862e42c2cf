"""Transforms: model -> equal model that is easier to quantize. One file each; adding one is one entry here.

A transform changes one layer's tensors (names without ``layers.N.``) and leaves what must happen at run time as
tensors of the layer, so that it survives save and load without code of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import Tensor

from squamata.errors import SquamataError, nearest
from squamata.models.config import ModelConfig
from squamata.spec.recipe import Recipe
from squamata.transform.hadamard import rotate_output

Tensors = dict[str, Tensor]
Transform = Callable[..., Tensors]

TRANSFORMS: dict[str, Transform] = {"hadamard": rotate_output}


def check(recipe: Recipe) -> None:
    """Refuse an unknown transform or parameter, naming the nearest."""
    for transform in recipe.transforms:
        if transform.name not in TRANSFORMS:
            raise SquamataError(
                f"recipe {recipe.name}: no transform named '{transform.name}'{nearest(transform.name, TRANSFORMS)}"
            )
        known = list(inspect.signature(TRANSFORMS[transform.name]).parameters)[2:]
        for key in transform.parameters:
            if key not in known:
                raise SquamataError(f"transform {transform.name}: no parameter '{key}'{nearest(key, known)}")


def apply(recipe: Recipe, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """All transforms of a recipe, in order, on one layer's tensors; the given mapping is not changed."""
    changed = dict(tensors)
    for transform in recipe.transforms:
        changed = TRANSFORMS[transform.name](config, changed, **transform.parameters)
    return changed
