"""Hadamard rotation of out_proj's input: outliers of y spread over all channels (Quamba, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.ref import rotate
from squamata.models.config import ModelConfig
from squamata.scales.statistics import Statistics


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
    rotated = rotate(weight.double(), rotation).to(weight.dtype if weight.dtype == torch.float64 else torch.float32)
    return dict(tensors) | {
        "mixer.out_proj.weight": rotated,
        "mixer.rotation": torch.tensor([rotation.size, rotation.block]),
    }
