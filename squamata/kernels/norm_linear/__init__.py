"""Coarse op: residual add, RMS norm, quantize, project, split into sites."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from squamata.kernels.dispatch import coarse_operation
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@coarse_operation
def norm_linear(  # type: ignore[empty-body]
    h: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    epsilon: float,
    layer: Linear,
    into: Site,
    out: Sequence[Site | None],
) -> tuple[tuple[Value, ...], Tensor]:
    """``rms_norm`` landed on ``into``, then ``linear`` landed on ``out``. Returns (outputs, residual')."""
