"""Read a checkpoint: everything is checked (version, names, shapes, dtypes) before any tensor is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from squamata.errors import SquamataError, about
from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.kernels.sparse import SparseRows, column_type
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig, parameter_shapes
from squamata.models.lm import KINDS, model_layouts, model_sites
from squamata.save.format import (
    CONFIG,
    INDEX,
    VERSION,
    data_signature,
    scale_name,
    scale_signature,
    sparse_names,
)
from squamata.spec.groups import ordered_sites
from squamata.spec.quant import SITE_PARTS, QuantSpec
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites, input_of
from squamata.spec.yaml_file import said

_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I64": torch.int64,
    "I32": torch.int32,
}
ALIGNMENT = 64  # bytes: a cache line, and what torch gives its own tensors
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Signature = tuple[tuple[int, ...] | None, torch.dtype | None]  # shape, dtype; None: any shape, any float


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder that ``write_checkpoint`` wrote. SquamataError names the first thing that is wrong."""
    description = read_description(folder)
    config, recipe = parse(description, folder)
    with about(f"{folder}/{CONFIG}"):
        specs = recipe.resolve(config.blocks)
    shards = _shards(folder)
    stored = {name: signature for path in shards for name, signature in _signatures(path).items()}
    added = _left_in_layers(config, recipe, stored)
    _check(folder, stored, _expected(config, specs) | added)
    raw = {name: tensor for path in shards for name, tensor in _load(path).items()}
    _refuse_bad_numbers(folder, raw)
    _check_ragged(folder, config, specs, raw)
    _check_sparse(folder, config, specs, raw)
    tensors: dict[str, Value] = {}
    layouts, infos = model_layouts(config), all_sites(config.blocks)
    for name, shape in parameter_shapes(config).items():
        if name in specs:
            partition = Partition(specs[name].granularity, layouts[name])
            quantized = _quantized(name, raw, specs[name], partition, shape)
            order = raw.get(f"{input_of(name, infos[name])}.order") if specs[name].kept_channels else None
            tensors[name] = replace(quantized, order=order)
        else:
            tensors[name] = raw[name]
    tensors |= {name: raw[name] for name in added}
    sites = recipe.static_sites(config.blocks)
    site_tensors = {
        name: tensor for name, tensor in raw.items() if name.rpartition(".")[0] in sites or name.endswith(".order")
    }
    recorded = description["quantization_config"].items()
    provenance = {key: value for key, value in recorded if key not in ("quant_method", "recipe")}
    return Checkpoint(config, tensors, recipe, site_tensors, provenance, folder)


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of ours, with its version checked."""
    path = folder / CONFIG
    try:
        description = json.loads(path.read_text())
        version = int(description["squamata_format"])
    except FileNotFoundError:
        raise SquamataError(f"{folder}: no {CONFIG}, so this is not a checkpoint") from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
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
    except KeyError as error:
        raise SquamataError(f"{folder}/{CONFIG}: has no {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["model", *map(str, first["loc"])])
        raise SquamataError(f"{folder}/{CONFIG}: {where}: {said(first)}") from None
    except (TypeError, ValueError):
        raise SquamataError(
            f"{folder}/{CONFIG}: 'model' or 'quantization_config' is not as Squamata writes it; copy it again"
        ) from None


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            raise SquamataError(f"{folder / INDEX}: not a shard index") from None
        if outside := [name for name in names if Path(str(name)).name != name]:
            raise SquamataError(f"{folder / INDEX}: '{outside[0]}' is not a file in this folder")
        return [folder / name for name in names]
    return [folder / "model.safetensors"]


def _signatures(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for name, part in slices.items()}
    except FileNotFoundError:
        raise SquamataError(f"{path}: this shard is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise SquamataError(
            f"{path}: damaged or truncated ({str(error).splitlines()[0]}); copy or download it again"
        ) from None


def _load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _aligned(tensor: Tensor) -> Tensor:
    """The same values where a float product sums them in the order it uses for any other tensor.

    A tensor of a mapped file begins where the one before it ends, and BLAS libraries choose their order of summation
    by the address: the logits would differ in the last bits from those of the model that was saved.
    """
    return tensor.clone() if tensor.is_floating_point() and tensor.data_ptr() % ALIGNMENT else tensor


def _expected(config: ModelConfig, specs: dict[str, QuantSpec]) -> dict[str, Signature]:
    """Every tensor that a checkpoint of this model and these specs has, those of transforms left out."""
    layouts = model_layouts(config)
    expected: dict[str, Signature] = {}
    for name, full_shape in parameter_shapes(config).items():
        spec = specs.get(name)
        expected[name] = data_signature(full_shape, spec)
        if spec is not None:
            scale = scale_signature(spec, layouts[name])
            expected |= _with_second(name, spec, scale) | _sparse(name, spec, full_shape)
    ordered = ordered_sites(specs, all_sites(config.blocks))
    for site in model_sites(config, specs):
        if site.spec is not None and not site.spec.dynamic:
            ragged = site.spec.granularity.ragged
            expected |= _with_second(site.name, site.spec, (None if ragged else site.partition.shape(), torch.float32))
            expected |= {f"{site.name}.index": (None, torch.int64)} if ragged else {}
        if site.name in ordered:
            expected[f"{site.name}.order"] = (site.layout.sizes, torch.int64)
    return expected


def _left_in_layers(config: ModelConfig, recipe: Recipe, stored: Mapping[str, Signature]) -> dict[str, Signature]:
    """What the blocks declare that may be left in them: where it is stored, and where the recipe says it must be."""
    used = {method.name for method in (*recipe.transforms, *([recipe.correct] if recipe.correct else []))}
    return {
        name: (tensor.shape, tensor.dtype)
        for layer, kind in enumerate(config.blocks)
        for rest, tensor in KINDS[kind].optional_tensors(config).items()
        if ((name := f"layers.{layer}.{rest}") in stored and used) or tensor.left_by in used
    }


def _with_second(name: str, spec: QuantSpec, scale: Signature) -> dict[str, Signature]:
    shape = scale[0][:1] if spec.second_level and scale[0] is not None else scale[0]  # a row's
    second = {} if spec.second is None else {f"{name}.{spec.second}": (shape, torch.float32)}
    return {scale_name(name, spec): scale} | second


def _sparse(name: str, spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, Signature]:
    """The sparse part of a weight (N, K), of which only reading says how many elements it has."""
    if not spec.sparse:
        return {}
    signatures = (((shape[0] + 1,), torch.int32), (None, column_type(shape[1])), (None, torch.float16))
    return dict(zip(sparse_names(name), signatures, strict=True))


def _check(folder: Path, stored: Mapping[str, Signature], expected: Mapping[str, Signature]) -> None:
    for name, (shape, dtype) in expected.items():
        if name not in stored:
            raise SquamataError(f"{folder}: tensor '{name}' is missing")
        found_shape, found_dtype = stored[name]
        if shape is not None and found_shape != shape:
            raise SquamataError(f"{folder}: tensor '{name}' has shape {found_shape} where {shape} was expected")
        if found_dtype not in (_FLOATS if dtype is None else (dtype,)):
            wanted = "a float type" if dtype is None else dtype
            raise SquamataError(f"{folder}: tensor '{name}' is {found_dtype} where {wanted} was expected")
    for name in stored:
        if name not in expected:
            raise SquamataError(f"{folder}: tensor '{name}' does not belong to this model")


def _quantized(
    name: str, raw: dict[str, Tensor], spec: QuantSpec, partition: Partition, shape: tuple[int, ...]
) -> QTensor:
    if spec.tabulated:
        sparse = SparseRows(*(raw[part] for part in sparse_names(name))) if spec.sparse else None
        return QTensor(raw[name], raw[scale_name(name, spec)].float(), spec, None, shape[-1], sparse)
    scale = partition.expand(raw[f"{name}.scale"].float())
    second = None if spec.second is None else raw[f"{name}.{spec.second}"]
    if second is not None:
        second = second[:, None] if spec.second_level else partition.expand(second)
    packed = raw[name].dtype == torch.uint8
    return QTensor(raw[name], scale, spec, second, shape[-1] if packed else None)


def _refuse_bad_numbers(folder: Path, raw: Mapping[str, Tensor]) -> None:
    for name, tensor in raw.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SquamataError(f"{folder}: tensor '{name}' holds NaN or infinity")
        if name.endswith(".scale") and not bool((tensor > 0).all()):
            raise SquamataError(f"{folder}: tensor '{name}' holds a scale that is not above zero")


def _check_ragged(folder: Path, config: ModelConfig, specs: Mapping[str, QuantSpec], raw: Mapping[str, Tensor]) -> None:
    """The map of every ragged site fits the site, and its scales fit the map; an order has every channel once."""
    for site in model_sites(config, specs):
        order = raw.get(f"{site.name}.order")
        if order is not None and not torch.equal(order.sort().values, torch.arange(len(order))):
            raise SquamataError(f"{folder}: tensor '{site.name}.order' does not hold every channel once")
        if (index := raw.get(f"{site.name}.index")) is None:
            continue
        shape = tuple(index.shape)
        if not shape or shape != site.layout.sizes[: len(shape)] or int(index.min()) < 0:
            raise SquamataError(f"{folder}: tensor '{site.name}.index' is no map of a site of {site.layout.sizes}")
        wanted = Partition(site.partition.granularity, site.layout, index).shape()
        for name in (f"{site.name}.{part}" for part in SITE_PARTS if part != "index"):
            if name in raw and tuple(raw[name].shape) != wanted:
                found = tuple(raw[name].shape)
                raise SquamataError(f"{folder}: tensor '{name}' has shape {found} where {wanted} was expected")


def _check_sparse(folder: Path, config: ModelConfig, specs: Mapping[str, QuantSpec], raw: Mapping[str, Tensor]) -> None:
    """Every sparse part is a matrix of the size of its weight: rows follow each other, columns rise within a row."""
    for name, (_, width) in ((name, shape) for name, shape in parameter_shapes(config).items() if len(shape) == 2):
        if name not in specs or not specs[name].sparse:
            continue
        pointers, columns, values = (raw[part] for part in sparse_names(name))
        steps = pointers.diff()
        if int(pointers[0]) or bool((steps < 0).any()) or not int(pointers[-1]) == len(columns) == len(values):
            raise SquamataError(f"{folder}: tensor '{name}.sparse_rows' does not fit the sparse part of {len(values)}")
        places = columns.long() + width * torch.arange(len(steps)).repeat_interleave(steps)
        inside = (columns >= 0) & (columns < width)
        if not bool(inside.all()) or bool((places.diff() <= 0).any()):
            raise SquamataError(
                f"{folder}: tensor '{name}.sparse_columns' does not rise within 0 to {width - 1} in a row"
            )
