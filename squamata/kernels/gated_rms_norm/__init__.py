"""Mamba-2's gated norm: gate, then RMS norm in groups."""

from __future__ import annotations

from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@operation
def gated_rms_norm(y: Tensor, z: Value, weight: Tensor, epsilon: float, groups: int, out: Site) -> Value:  # type: ignore[empty-body]
    """v = y SiLU(z);  v / sqrt(mean over each of G groups of v^2 + epsilon) * weight, landed on ``out``.

    ``y``, ``z``: (B, L, E); ``weight``: (E,). Dao and Gu 2024, section 7.1 (GroupNorm before the output projection).
    """
