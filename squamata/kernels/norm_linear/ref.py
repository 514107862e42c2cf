"""Composition of the fine ops: the definition a fused kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from squamata.kernels.linear import Linear, linear
from squamata.kernels.qtensor import Value
from squamata.kernels.rms_norm import rms_norm
from squamata.kernels.site import Site


def run(
    h: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    epsilon: float,
    layer: Linear,
    into: Site,
    out: Sequence[Site | None],
) -> tuple[tuple[Value, ...], Tensor]:
    normed, residual = rms_norm(h, residual, weight, epsilon, into)
    return linear(normed, layer, out), residual
