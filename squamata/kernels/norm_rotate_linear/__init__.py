"""Coarse op: (gated norm,) rotation, quantize, project back to the residual width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squamata.kernels.dispatch import coarse_operation
from squamata.kernels.hadamard import Rotation
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@dataclass
class GatedNorm:
    """Weight (E,), epsilon and number of groups of Mamba-2's gated norm."""

    weight: Tensor
    epsilon: float
    groups: int


@coarse_operation
def norm_rotate_linear(  # type: ignore[empty-body]
    y: Value,
    z: Value | None,
    norm: GatedNorm | None,
    rotation: Rotation | None,
    layer: Linear,
    landing: Site,
    into: Site,
) -> Tensor:
    """``gated_rms_norm`` onto ``landing`` (skipped without a norm), ``hadamard`` onto ``into``, ``linear`` in float."""
