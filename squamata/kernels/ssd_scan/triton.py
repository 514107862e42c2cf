"""float32 on a GPU, for many tokens: one kernel for all chunks (``gpu.float32``)."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.gpu.float32 import scan_heads
from squamata.kernels.qtensor import Value
from squamata.kernels.ssd_scan import HeadLayout

FEWEST_TOKENS = 16


def accepts(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, dt_bias: Tensor, state: Tensor, layout: HeadLayout
) -> bool:
    values = (u, dt, B, C, state)
    if not all(isinstance(x, Tensor) and x.is_cuda and x.dtype == torch.float32 for x in values):
        return False
    return u.shape[1] >= FEWEST_TOKENS and not torch.is_grad_enabled()


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, dt_bias: Tensor, state: Tensor, layout: HeadLayout
) -> tuple[Tensor, Tensor]:
    assert isinstance(u, Tensor) and isinstance(dt, Tensor) and isinstance(B, Tensor) and isinstance(C, Tensor)
    return scan_heads(u, dt, A, B, C, D, dt_bias, state, layout.time_step_limit)
