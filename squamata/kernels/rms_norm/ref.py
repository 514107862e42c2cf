"""Reference."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


def run(h: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, out: Site) -> tuple[Value, Tensor]:
    residual = h if residual is None else residual + h
    return out.land(normalize(residual, epsilon) * weight), residual


def normalize(x: Tensor, epsilon: float) -> Tensor:
    """x / RMS(x) over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
