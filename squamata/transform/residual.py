"""The residual stream: norm weights folded into what reads it, then a rotation of all that writes or reads it.

Both leave the model's function alone. RMS norm divides by a length, which a rotation does not change, so a rotated
stream passes a norm without weight as it would pass the rotation: norm(x H^T) = norm(x) H^T (QuaRot, arXiv 2404.00456,
section 3; Quamba, section 4.3). Nothing is left to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.hadamard import Rotation
from squamata.models.config import ModelConfig
from squamata.scales.statistics import Statistics
from squamata.transform.hadamard import BLOCK, rotate_weight

Turn = Callable[[Tensor], Tensor]


def fold_norm(
    config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
) -> dict[str, Tensor]:
    """W_in <- W_in diag(gamma), gamma <- 1. A layer without an in_proj stays as it is."""
    weight = tensors.get("mixer.in_proj.weight")
    if weight is None:
        return dict(tensors)
    gamma = tensors["norm.weight"]
    return dict(tensors) | {
        "mixer.in_proj.weight": _scale_columns(weight, gamma),
        "norm.weight": torch.ones_like(gamma),
    }


def fold_final_norm(
    config: ModelConfig, tensors: Mapping[str, Tensor], statistics: Mapping[str, object]
) -> dict[str, Tensor]:
    """The same for the final norm and the head, which is untied by that."""
    if "head.weight" not in tensors:
        return dict(tensors)
    gamma = tensors["final_norm.weight"]
    return dict(tensors) | {
        "head.weight": _scale_columns(tensors["head.weight"], gamma),
        "final_norm.weight": torch.ones_like(gamma),
    }


def rotate_residual(
    config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
) -> dict[str, Tensor]:
    """What reads the stream, W_in <- W_in H^T, and what writes it, W_out <- H W_out and its bias.

    SquamataError unless the norm's weight is folded. Where d_model has no Hadamard matrix the rotation is
    block-diagonal.
    """
    rotation = Rotation.of_size(config.d_model)
    return turn_layer(tensors, lambda weight: rotate_weight(weight, rotation))


def rotate_ends(
    config: ModelConfig, tensors: Mapping[str, Tensor], statistics: Mapping[str, object]
) -> dict[str, Tensor]:
    """The embedding's rows, which write the stream first, and the head's, which read it last."""
    rotation = Rotation.of_size(config.d_model)
    return turn_ends(tensors, lambda table: rotate_weight(table, rotation))


def turn_layer(tensors: Mapping[str, Tensor], turn: Turn) -> dict[str, Tensor]:
    """A layer whose stream is turned as ``turn`` turns the rows of a matrix (n, D); one without projections stays."""
    if "mixer.in_proj.weight" not in tensors or "mixer.out_proj.weight" not in tensors:
        return dict(tensors)
    _require_folded(tensors["norm.weight"])
    changed = {
        "mixer.in_proj.weight": turn(tensors["mixer.in_proj.weight"]),
        "mixer.out_proj.weight": turn(tensors["mixer.out_proj.weight"].T).T.contiguous(),
    }
    if "mixer.out_proj.bias" in tensors:
        changed["mixer.out_proj.bias"] = turn(tensors["mixer.out_proj.bias"][None])[0]
    return dict(tensors) | changed


def turn_ends(tensors: Mapping[str, Tensor], turn: Turn) -> dict[str, Tensor]:
    """Embedding and head of a model whose stream is turned so."""
    if "final_norm.weight" in tensors:
        _require_folded(tensors["final_norm.weight"])
    tables = {name: tensors[name] for name in ("embedding.weight", "head.weight") if name in tensors}
    return dict(tensors) | {name: turn(table) for name, table in tables.items()}


def _require_folded(gamma: Tensor) -> None:
    if not bool((gamma == 1).all()):
        raise SquamataError("transform rotate_residual or klt: norm weights are in its way; put fold_norm before it")


def _scale_columns(weight: Tensor, gamma: Tensor) -> Tensor:
    """weight diag(gamma), computed in float64 a block of rows at a time, kept in float32 (float64 stays)."""
    scaled = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    rows = max(1, BLOCK // weight.shape[-1])
    for part, into in zip(weight.split(rows), scaled.split(rows), strict=True):
        into.copy_(part.double() * gamma.double())
    return scaled
