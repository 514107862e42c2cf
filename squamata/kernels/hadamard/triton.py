"""float32 rows on a GPU: two small products, H_{m 2^(k-7)} and H_{2^7}, instead of a pass over memory a butterfly."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.matrices import hadamard_matrix
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site

WIDEST = 128  # channels of the second product


def accepts(y: Tensor, rotation: Rotation | None, out: Site) -> bool:
    differentiated = torch.is_grad_enabled() and y.requires_grad
    return y.is_cuda and y.dtype == torch.float32 and rotation is not None and not differentiated


def run(y: Tensor, rotation: Rotation | None, out: Site) -> Value:
    assert rotation is not None
    left, right = _factors(rotation, y.device)
    x = y.reshape(-1, len(left), len(right)) @ right
    return out.land((left @ x).reshape(y.shape))


@cache
def _factors(rotation: Rotation, device: torch.device) -> tuple[Tensor, Tensor]:
    """H_m (x) H_{2^(k-7)} / sqrt(block), and H_{2^7}; a block narrower than 2^7 has the second alone beside H_m."""
    with torch.device("cpu"):
        side = min(rotation.parts[1], WIDEST)
        left = torch.kron(rotation.base.cpu(), hadamard_matrix(rotation.parts[1] // side)) * rotation.block**-0.5
        return left.to(device), hadamard_matrix(side).to(device)
