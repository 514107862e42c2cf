"""RMS norm of the residual stream, landing on a site."""

from __future__ import annotations

from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@operation
def rms_norm(h: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, out: Site) -> tuple[Value, Tensor]:  # type: ignore[empty-body]
    """residual' = residual + h;  y = residual' / sqrt(mean(residual'^2) + epsilon) * weight, landed on ``out``.

    ``h``, ``residual``: float (B, L, D); no residual means zero. Returns (y, residual').
    Zhang and Sennrich 2019, eq. 4.
    """
