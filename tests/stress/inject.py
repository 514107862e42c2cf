"""Outliers put into a model without changing what it computes: a few channels of a linear pair times c, the partner
by 1/c.

Between the two there must be nothing but products and sums. In these blocks that leaves four places: a norm's weight
and the columns of the product after it (``in``, ``out`` of Mamba-2, ``head.in``), x_proj's rows for dt and dt_proj's
columns (``dt_low``), and x_proj's rows for B and for C, of which only the product counts (``BC``; the state is scaled
with B). Everything else passes SiLU, softplus or an exponential. Factors are powers of two, so that the scaled weights
are exact.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from layout_writers import write_state_spaces

from squamata.load.source import open_source
from squamata.models.config import ModelConfig

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Side:
    """One side of a pair: the tensor (without ``layers.N.``), the axis of its channels, and where they start."""

    tensor: str
    axis: int
    first: Callable[[ModelConfig], int] = lambda config: 0


@dataclass(frozen=True)
class Pair:
    """``loud`` is multiplied by the factor, ``quiet`` divided; ``size`` channels to choose from."""

    kinds: tuple[str, ...]
    loud: Side
    quiet: Side
    size: Callable[[ModelConfig], int]


PAIRS = {
    "in": Pair(
        ("mamba1", "mamba2"), Side("norm.weight", 0), Side("mixer.in_proj.weight", 1), lambda config: config.d_model
    ),
    "out": Pair(
        ("mamba2",), Side("mixer.gate_norm.weight", 0), Side("mixer.out_proj.weight", 1), lambda config: config.d_inner
    ),
    "dt_low": Pair(
        ("mamba1",), Side("mixer.x_proj.weight", 0), Side("mixer.dt_proj.weight", 1), lambda config: config.dt_rank
    ),
    "BC": Pair(
        ("mamba1",),
        Side("mixer.x_proj.weight", 0, lambda config: config.dt_rank),
        Side("mixer.x_proj.weight", 0, lambda config: config.dt_rank + config.d_state),
        lambda config: config.d_state,
    ),
    "head": Pair(
        ("mamba1", "mamba2"), Side("final_norm.weight", 0), Side("head.weight", 1), lambda config: config.d_model
    ),
}


def inject(
    config: ModelConfig, tensors: Tensors, name: str, factor: float, channels: int = 4, seed: int = 0
) -> tuple[ModelConfig, Tensors]:
    """An equal model with ``channels`` outlier channels at a pair, others in every layer; a tied head is untied."""
    pair, changed = PAIRS[name], dict(tensors)
    generator = torch.Generator().manual_seed(seed)
    if name == "head":
        if config.tie_embeddings:
            config = config.model_copy(update={"tie_embeddings": False})
            changed["head.weight"] = changed["embedding.weight"].clone()
        prefixes = [""]
    else:
        prefixes = [f"layers.{layer}." for layer, kind in enumerate(config.blocks) if kind in pair.kinds]
    for prefix in prefixes:
        chosen = torch.randperm(pair.size(config), generator=generator)[:channels]
        for side, scale in ((pair.loud, factor), (pair.quiet, 1 / factor)):
            changed[prefix + side.tensor] = _scaled(changed[prefix + side.tensor], side, config, chosen, scale)
    return config, changed


def _scaled(tensor: torch.Tensor, side: Side, config: ModelConfig, chosen: torch.Tensor, scale: float) -> torch.Tensor:
    scaled = tensor.clone()
    places = (slice(None),) * side.axis + (side.first(config) + chosen,)
    scaled[places] = scaled[places] * scale
    return scaled


def injected_folder(source: Path, target: Path, name: str, factor: float) -> Path:
    """A copy of a float model's folder, in the state-spaces layout, with outliers at a pair."""
    opened = open_source(source)
    config, tensors = inject(opened.config, opened.tensors(), name, factor)
    write_state_spaces(target, config, tensors)
    for path in source.glob("*token*.json"):
        shutil.copyfile(path, target / path.name)
    return target
