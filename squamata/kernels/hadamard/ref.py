"""Reference: log2 butterflies, then one small product with H_m."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


def run(y: Tensor, rotation: Rotation | None, out: Site) -> Value:
    return out.land(y if rotation is None else rotate(y, rotation))


def rotate(y: Tensor, rotation: Rotation) -> Tensor:
    """y H^T / sqrt(block), block by block along the last axis."""
    order, power = rotation.parts
    x = y.reshape(-1, order, power)
    width = 1
    while width < power:
        pairs = x.reshape(-1, order, power // (2 * width), 2, width)
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2)
        width *= 2
    x = x.reshape(-1, order, power)
    if order > 1:
        x = rotation.base.to(x) @ x
    return (x * rotation.block**-0.5).reshape(y.shape)
