"""Tiny random models in which no number is trivial, in memory or as a folder on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from layout_writers import write_state_spaces

from squamata.kernels.dispatch import use_backend
from squamata.load.hub import bundled
from squamata.load.random_model import random_tensors
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts
from squamata.spec.recipe import Recipe

Tensors = dict[str, torch.Tensor]


def config_of(kind: str, **overrides: Any) -> ModelConfig:
    """Two layers of 32 channels; any field may be given."""
    fields: dict[str, Any] = {"blocks": (kind,) * 2, "d_model": 32, "vocab_size": 61, "d_inner": 64, "d_state": 16}
    fields |= {"dt_rank": 3} if kind == "mamba1" else {"head_dim": 16, "n_groups": 2}
    return ModelConfig(**(fields | overrides))


def perturbed_tensors(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Initial weights with norms, D, A and biases made non-trivial."""
    tensors = {}
    for name, tensor in random_tensors(config, seed).items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(crc32(f"{seed}+{name}".encode())))
        if name == "embedding.weight":
            tensor = noise
        elif name.endswith(("bias", "norm.weight", ".D", "A_log")):
            tensor = tensor + 0.3 * noise
        tensors[name] = tensor.to(dtype)
    return tensors


def float_model(config: ModelConfig, tensors: Tensors, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(Checkpoint(config, tensors, Recipe.read("float")), "float", dtype)


def random_ids(config: ModelConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


class MemorySource:
    """Tensors in memory as a source of the pipeline."""

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        self.config = config
        self._tensors = tensors

    def tensors(self, prefix: str = "") -> Tensors:
        return {name: tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}


def quantized(config: ModelConfig, tensors: Tensors, recipe: Recipe, batches: list[torch.Tensor]) -> Checkpoint:
    """Quantize in memory with the reference kernels."""
    with use_backend("ref"):
        parts = QuantizedParts(MemorySource(config, tensors), recipe, batches)
        return Checkpoint.of_parts(parts.config, recipe, parts.each())


def recipe_of(*rules: dict[str, Any], **fields: Any) -> Recipe:
    """A recipe of these rules."""
    return Recipe.from_mapping({"name": "test", "rules": list(rules)} | fields)


def write_tiny_folder(folder: Path, kind: str, **overrides: Any) -> Path:
    """A float model folder in the state-spaces layout, with the bundled tokenizer."""
    config = config_of(kind, **({"vocab_size": 8192} | overrides))
    write_state_spaces(folder, config, perturbed_tensors(config))
    for path in bundled().glob("*token*.json"):
        shutil.copyfile(path, folder / path.name)
    return folder
