"""Hadamard rotation of out_proj's input: outliers of y spread over all channels (Quamba, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.ref import rotate
from squamata.models.config import ModelConfig
from squamata.scales.statistics import Statistics

BLOCK = 2**22  # elements that are float64 at a time


def rotate_output(
    config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
) -> dict[str, Tensor]:
    """W <- W H^T, and y <- H y at run time just before out_proj, whose input site is then the rotated one.

    Where d_inner has no Hadamard matrix the rotation is block-diagonal, with the largest block that has one. A layer
    without an out_proj stays as it is.
    """
    weight = tensors.get("mixer.out_proj.weight")
    if weight is None:
        return dict(tensors)
    rotation = Rotation.of_size(config.d_inner)
    return dict(tensors) | {
        "mixer.out_proj.weight": rotate_weight(weight, rotation),
        "mixer.rotation": torch.tensor([rotation.size, rotation.block]),
    }


def rotate_weight(weight: Tensor, rotation: Rotation) -> Tensor:
    """W H^T, computed in float64 a block of rows at a time, kept in float32 (float64 stays)."""
    rotated = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    rows = max(1, BLOCK // weight.shape[-1])
    for part, into in zip(weight.split(rows), rotated.split(rows), strict=True):
        into.copy_(rotate(part.double(), rotation))
    return rotated
