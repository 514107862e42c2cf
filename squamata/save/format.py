"""What both the writer and the reader know of the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from squamata.kernels.partition import Layout, Partition
from squamata.models.config import ModelConfig
from squamata.spec.quant import TABLE, QuantSpec

VERSION = 1
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_ARCHITECTURES = {"mamba1": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


def describe(config: ModelConfig, recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json; infinite limits are written as null."""
    model = config.model_dump(mode="json")
    model["time_step_limit"] = [low if abs(low) != float("inf") else None for low in config.time_step_limit]
    return {
        "squamata_format": VERSION,
        "architectures": [_ARCHITECTURES.get(config.architecture, "HybridForCausalLM")],
        "model_type": config.architecture,
        "model": model,
        "quantization_config": {"quant_method": "squamata", "recipe": dict(recipe)} | dict(provenance),
    }


def data_signature(shape: tuple[int, ...], spec: QuantSpec | None) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype in which a tensor is stored: int8 codes, two 4-bit codes a byte, or any float (None)."""
    if spec is None:
        return shape, None
    if spec.tabulated:
        return (shape[0], spec.bits * -(-shape[1] // 8)), torch.uint8
    if spec.bits <= 4 and spec.symmetric and len(shape) == 2:
        return (shape[0], -(-shape[1] // 2)), torch.uint8
    return shape, torch.int8


def scale_signature(spec: QuantSpec, layout: Layout) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype in which the scales of a weight, or the tables of its rows, are stored."""
    shape = Partition(spec.granularity, layout).shape()
    return (*shape, spec.numbers) if spec.tabulated else shape, getattr(torch, spec.scale_dtype)


def scale_name(name: str, spec: QuantSpec) -> str:
    """Under which the scales of a weight, or the tables of its rows, are stored."""
    return f"{name}.{TABLE if spec.tabulated else 'scale'}"


def sparse_names(name: str) -> tuple[str, str, str]:
    """Under which row pointers, columns and values of the sparse part of a weight are stored."""
    return f"{name}.sparse_rows", f"{name}.sparse_columns", f"{name}.sparse_values"
