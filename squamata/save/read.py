"""Read a checkpoint: everything is checked (version, names, shapes, dtypes) before any tensor is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig, parameter_shapes
from squamata.models.lm import model_layouts
from squamata.save.format import CONFIG, INDEX, VERSION, data_signature, scale_signature
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites

_DTYPES = {
    "I8": torch.int8, "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32,
}
_ADDED_BY_TRANSFORMS = ("mixer.rotation",)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder that ``write_checkpoint`` wrote. SquamataError names the first thing that is wrong."""
    description = read_description(folder)
    config, recipe = parse(description, folder)
    specs = recipe.resolve(config.blocks)
    shards = _shards(folder)
    stored = {name: signature for path in shards for name, signature in _signatures(path).items()}
    _check(folder, stored, config, specs)
    raw = {name: tensor for path in shards for name, tensor in _load(path).items()}
    tensors: dict[str, Value] = {}
    layouts = model_layouts(config)
    for name, shape in parameter_shapes(config).items():
        spec = specs.get(name)
        tensors[name] = raw[name] if spec is None else _quantized(name, raw, spec, Partition(spec.granularity, layouts[name]), shape)
    tensors |= {name: tensor for name, tensor in raw.items() if name.endswith(_ADDED_BY_TRANSFORMS)}
    sites = _site_names(config, specs)
    site_tensors = {name: tensor for name, tensor in raw.items() if name.rpartition(".")[0] in sites}
    _refuse_nan(folder, raw)
    provenance = {key: value for key, value in description["quantization_config"].items() if key not in ("quant_method", "recipe")}
    return Checkpoint(config, tensors, recipe, site_tensors, provenance, folder)


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of ours, with its version checked."""
    path = folder / CONFIG
    try:
        description = json.loads(path.read_text())
        version = description["squamata_format"]
    except FileNotFoundError:
        raise SquamataError(f"{folder}: no {CONFIG}, so this is not a checkpoint") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise SquamataError(f"{path}: not the {CONFIG} of a Squamata checkpoint") from None
    if version > VERSION:
        raise SquamataError(
            f"{folder}: written in format {version}, this version reads up to {VERSION}; upgrade squamata"
        )
    return description


def parse(description: dict[str, Any], folder: Path) -> tuple[ModelConfig, Recipe]:
    """Model configuration and recipe of a description."""
    try:
        model = dict(description["model"])
        low, high = model["time_step_limit"]
        model["time_step_limit"] = (-math.inf if low is None else low, math.inf if high is None else high)
        recipe = Recipe.from_mapping(description["quantization_config"]["recipe"], origin=f"{folder}/{CONFIG}")
        return ModelConfig(**model), recipe
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise SquamataError(f"{folder}/{CONFIG}: {str(error).splitlines()[0]}") from None


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise SquamataError(f"{folder / INDEX}: not a shard index") from None
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"]


def _signatures(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for name, part in slices.items()}
    except FileNotFoundError:
        raise SquamataError(f"{path}: this shard is missing") from None
    except (SafetensorError, OSError) as error:
        raise SquamataError(f"{path}: damaged or truncated ({str(error).splitlines()[0]})") from None


def _load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _site_names(config: ModelConfig, specs: dict[str, QuantSpec]) -> set[str]:
    infos = all_sites(config.blocks)
    return {
        name for name, spec in specs.items() if infos[name].kind in ("activation", "state") and not spec.dynamic
    }


def _check(
    folder: Path,
    stored: dict[str, tuple[tuple[int, ...], torch.dtype | None]],
    config: ModelConfig,
    specs: dict[str, QuantSpec],
) -> None:
    layouts = model_layouts(config)
    expected: dict[str, tuple[tuple[int, ...] | None, torch.dtype | None]] = {}
    for name, shape in parameter_shapes(config).items():
        spec = specs.get(name)
        expected[name] = data_signature(shape, spec)
        if spec is not None:
            expected[f"{name}.scale"] = scale_signature(spec, layouts[name])
    expected |= {f"{name}.scale": (None, torch.float32) for name in _site_names(config, specs)}
    for name, (shape, dtype) in expected.items():
        if name not in stored:
            raise SquamataError(f"{folder}: tensor '{name}' is missing")
        if shape is not None and stored[name][0] != shape:
            raise SquamataError(f"{folder}: tensor '{name}' has shape {stored[name][0]} where {shape} was expected")
        if dtype is not None and stored[name][1] != dtype:
            raise SquamataError(f"{folder}: tensor '{name}' is {stored[name][1]} where {dtype} was expected")
    known = (*_ADDED_BY_TRANSFORMS, ".zero", ".index")
    for name in stored:
        if name not in expected and not name.endswith(known):
            raise SquamataError(f"{folder}: tensor '{name}' does not belong to this model")


def _quantized(
    name: str, raw: dict[str, Tensor], spec: QuantSpec, partition: Partition, shape: tuple[int, ...]
) -> QTensor:
    scale = partition.expand(raw[f"{name}.scale"].float())
    zero = partition.expand(raw[f"{name}.zero"]) if f"{name}.zero" in raw else None
    packed = raw[name].dtype == torch.uint8
    return QTensor(raw[name], scale, spec, zero, shape[-1] if packed else None)


def _refuse_nan(folder: Path, raw: dict[str, Tensor]) -> None:
    for name, tensor in raw.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SquamataError(f"{folder}: tensor '{name}' holds NaN or infinity")
