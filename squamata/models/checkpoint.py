"""Checkpoint: everything a model is made of, by name, in memory. What loaders give and the saver writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squamata.kernels.qtensor import Value
from squamata.models.config import ModelConfig
from squamata.spec.quant import SITE_PARTS
from squamata.spec.recipe import Recipe


@dataclass
class Checkpoint:
    """Tensors under our names, plus what the recipe's sites need to run.

    ``tensors``: weights and parameters, float or quantized, ``layers.3.mixer.in_proj.weight``; transforms may add
    tensors of their own (``layers.3.mixer.rotation``). ``site_tensors``: ``layers.3.mixer.u.scale`` (and the codec's
    second number, ``.zero``, and ``.index``). ``provenance``: calibration fingerprint, seed, package version: recorded,
    never interpreted.
    """

    config: ModelConfig
    tensors: Mapping[str, Value]
    recipe: Recipe
    site_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def of_parts(cls, config: ModelConfig, recipe: Recipe, parts: Iterable[Mapping[str, Value]]) -> Checkpoint:
        """A model from its parts, in each of which tensors and site tensors are together, as quantizing makes them."""
        tensors: dict[str, Value] = {}
        site_tensors: dict[str, Tensor] = {}
        for name, value in ((name, value) for part in parts for name, value in part.items()):
            if name.rpartition(".")[2] in SITE_PARTS and isinstance(value, Tensor):
                site_tensors[name] = value
            else:
                tensors[name] = value
        return cls(config, tensors, recipe, site_tensors)

    def on(self, device: torch.device | str) -> Checkpoint:
        """The same with every tensor on a device."""
        tensors = {name: value.to(device) for name, value in self.tensors.items()}
        site_tensors = {name: tensor.to(device) for name, tensor in self.site_tensors.items()}
        return replace(self, tensors=tensors, site_tensors=site_tensors)


def under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose name starts with ``prefix``, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
