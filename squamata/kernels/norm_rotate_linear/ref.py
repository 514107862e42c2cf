"""Composition of the fine ops: the definition a fused kernel is tested against."""

from __future__ import annotations

from torch import Tensor

from squamata.kernels.gated_rms_norm import gated_rms_norm
from squamata.kernels.hadamard import Rotation, hadamard
from squamata.kernels.linear import Linear, linear
from squamata.kernels.norm_rotate_linear import GatedNorm
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.site import Site


def run(
    y: Value,
    z: Value | None,
    norm: GatedNorm | None,
    rotation: Rotation | None,
    layer: Linear,
    landing: Site,
    into: Site,
) -> Tensor:
    if norm is not None:
        assert z is not None
        y = gated_rms_norm(as_float(y), z, norm.weight, norm.epsilon, norm.groups, landing)
    (h,) = linear(hadamard(as_float(y), rotation, into), layer, (None,))
    return as_float(h)
