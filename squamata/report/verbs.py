"""The verbs that studies are made of. They live behind a door (the pipeline), so a door hands them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from squamata.evaluate.perplexity import Evaluation
from squamata.models.config import ModelConfig
from squamata.run.model import Model
from squamata.spec.recipe import Recipe


@dataclass(frozen=True)
class Verbs:
    """Functions of a module, so that they can be sent to another process by name.

    ``quantize``, ``load``, ``evaluate``: as ``squamata.quantize`` and so on. ``check(recipe, config)``: SquamataError
    for a recipe that this model cannot have. ``hardware(config, recipe)``: figures of a chip (area, energy) by name.
    """

    quantize: Callable[..., Any]
    load: Callable[..., Model]
    evaluate: Callable[..., Evaluation]
    check: Callable[[Recipe, ModelConfig], None]
    hardware: Callable[[ModelConfig, Recipe], Mapping[str, float]] | None = None
