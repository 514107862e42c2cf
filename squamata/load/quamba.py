"""Checkpoints of Quamba and Quamba2 (enyac-group/Quamba, ``ut-enyac/quamba2-...``) in our canonical form.

A folder of theirs is ``config.json``, whose ``ssm_cfg.layer`` names the class of the quantized mixer, and a
``pytorch_model.bin`` with int8 or Marlin-packed weights and their scales. Codes and scales are taken as they are
stored; ``quamba_layers.py`` says which is which. What upstream computes in float16 we compute in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from squamata.errors import SquamataError, about
from squamata.kernels.qtensor import Value
from squamata.load.layouts import normalise
from squamata.load.quamba_layers import LayerParts, Stored, embedding_parts, head_parts, layer_parts
from squamata.load.tensor_files import read_json, unpickle
from squamata.models.checkpoint import Checkpoint, under
from squamata.models.config import ModelConfig
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Named, Recipe, Rule

_MIXER = re.compile(r"W(?P<weights>\d+)A(?P<activations>\d+)QMamba(?P<second>2?)")
_KNOWN = ("W8A8", "W4A8", "W4A16")


def is_quamba_checkpoint(folder: Path) -> bool:
    """Whether the folder's config.json names quantized mixers of Quamba."""
    path = folder / "config.json"
    return path.is_file() and bool(_mixers(read_json(path)))


def read_quamba(folder: Path) -> Checkpoint:
    """Read a folder of Quamba's; SquamataError names the first thing that is missing, misshapen or not supported."""
    path = folder / "config.json"
    config_file = read_json(path)
    mixers = _mixers(config_file)
    config = _model_config(config_file, mixers, str(path))
    precisions = _precisions(config, mixers, str(path))
    weights = folder / "pytorch_model.bin"
    if not weights.is_file():
        raise SquamataError(f"{folder}: no pytorch_model.bin, in which Quamba keeps its weights")
    stored = unpickle(weights)
    if not isinstance(stored, Mapping) or not all(isinstance(name, str) for name in stored):
        raise SquamataError(f"{weights}: holds a {type(stored).__name__}, not named tensors")
    with about(str(weights)):
        tensors, sites, specs = _parts(config, stored, precisions, config_file)
    name = f"quamba{'2' if config.architecture == 'mamba2' else ''}-{_together(precisions).lower()}-upstream"
    recipe = _recipe(name, specs, config)
    return Checkpoint(config, tensors, recipe, sites, {"converted_from": "Quamba " + "/".join(sorted(mixers))}, folder)


def _mixers(config_file: Mapping[str, Any]) -> set[str]:
    """Names of the mixer classes of a configuration: empty if it is none of Quamba's."""
    ssm = config_file.get("ssm_cfg")
    layer = ssm.get("layer") if isinstance(ssm, dict) else None
    layers = layer if isinstance(layer, list) else [{"": layer}]
    names = [name for one in layers if isinstance(one, dict) for name in one.values()]
    matching = {name for name in names if isinstance(name, str) and _MIXER.fullmatch(name)}
    return matching if len(matching) == len(set(map(str, names))) else set()


def _model_config(config_file: Mapping[str, Any], mixers: set[str], where: str) -> ModelConfig:
    """Theirs is the state-spaces configuration with other class names; the head is never tied."""
    kinds = {"Mamba2" if name.endswith("2") else "Mamba1" for name in mixers}
    if len(kinds) > 1:
        raise SquamataError(f"{where}: names mixers of Mamba-1 and of Mamba-2; a mixture is not supported")
    plain = dict(config_file) | {"ssm_cfg": dict(config_file["ssm_cfg"]) | {"layer": kinds.pop()}}
    return normalise(plain | {"tie_embeddings": False}, where)


def _precisions(config: ModelConfig, mixers: set[str], where: str) -> tuple[str, ...]:
    """The precisions that layers may have; SquamataError for one that Quamba's published code does not write."""
    found = {f"W{match['weights']}A{match['activations']}" for name in mixers if (match := _MIXER.fullmatch(name))}
    if unknown := sorted(found - set(_KNOWN)):
        raise SquamataError(f"{where}: mixers of {unknown[0]} are not supported (supported: {', '.join(_KNOWN)})")
    if config.projection_bias:
        raise SquamataError(f"{where}: projections with a bias, which Quamba does not quantize, are not supported")
    return tuple(sorted(found))


def _together(precisions: tuple[str, ...]) -> str:
    return precisions[0] if len(precisions) == 1 else "W4AX"


def _parts(
    config: ModelConfig, stored: Mapping[str, Any], precisions: tuple[str, ...], config_file: Mapping[str, Any]
) -> tuple[dict[str, Value], dict[str, Tensor], dict[str, QuantSpec]]:
    """Tensors, site tensors and specs of the whole model by our full names."""
    tensors: dict[str, Value] = {}
    sites: dict[str, Tensor] = {}
    specs: dict[str, QuantSpec] = {}

    def take(parts: LayerParts, prefix: str) -> None:
        tensors.update({prefix + name: value for name, value in parts.tensors.items()})
        sites.update({prefix + name: value for name, value in parts.sites.items()})
        specs.update({prefix + name: value for name, value in parts.specs.items()})

    embedding = str((config_file.get("embedding_cfg") or {}).get("layer", "Embedding"))
    take(embedding_parts(config, Stored(stored, "backbone.embedding."), embedding), "")
    for layer in range(config.n_layers):
        precision, own = _layer(stored, layer, precisions)
        take(layer_parts(config, layer, own, precision), f"layers.{layer}.")
    head = str((config_file.get("lm_head_cfg") or {}).get("layer", "Linear"))
    if len(precisions) > 1:
        head = "W4A8B16O16Linear"
    take(head_parts(config, Stored(stored, ""), head), "")
    return tensors, sites, specs


def _layer(stored: Mapping[str, Any], layer: int, precisions: tuple[str, ...]) -> tuple[str, Stored]:
    """Precision and tensors of a layer; where layers differ the precision is part of the names (``mixers.W4A8.``)."""
    prefix = f"backbone.layers.{layer}."
    choices = sorted({name.split(".")[4] for name in stored if name.startswith(f"{prefix}mixers.")})
    if not choices:
        return precisions[0], Stored(under(prefix, stored), "", prefix)
    if len(choices) > 1 or choices[0] not in _KNOWN:
        raise SquamataError(
            f"layer {layer} has mixers of {' and '.join(choices)}; a checkpoint with one of {', '.join(_KNOWN)} for "
            f"every layer is needed"
        )
    own = under(f"{prefix}norms.{choices[0]}.", stored)
    renamed = {f"norm.{name}": value for name, value in own.items()}
    inside = under(f"{prefix}mixers.{choices[0]}.", stored)
    return choices[0], Stored(renamed | {f"mixer.{name}": value for name, value in inside.items()}, "", prefix)


def _recipe(name: str, specs: Mapping[str, QuantSpec], config: ModelConfig) -> Recipe:
    """The recipe that says of every site what was found there."""
    rules = tuple(_rules(specs, config.n_layers))
    return Recipe(
        name=name,
        description="An upstream Quamba checkpoint as it was found.",
        architectures=(config.architecture,),
        transforms=(Named(name="hadamard"),),
        rules=rules,
    )


def _rules(specs: Mapping[str, QuantSpec], layers: int) -> Iterator[Rule]:
    """One rule a site name if all layers agree, else one for every group of layers that do."""
    groups: dict[tuple[str, str], tuple[QuantSpec, list[int]]] = {}
    for site, spec in specs.items():
        if not site.startswith("layers."):
            yield Rule(site=site, spec=spec)
            continue
        _, layer, rest = site.split(".", 2)
        groups.setdefault((rest, spec.model_dump_json()), (spec, []))[1].append(int(layer))
    for (rest, _), (spec, members) in groups.items():
        yield Rule(site=f"*.{rest}", spec=spec, layers=None if len(members) == layers else tuple(members))
