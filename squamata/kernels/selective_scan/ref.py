"""Reference: one step a token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.site import Site


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, z: Value, dt_bias: Tensor, state: Tensor, out: Site
) -> tuple[Value, Tensor]:
    u, dt, B, C, z = (as_float(value, A.dtype) for value in (u, dt, B, C, z))
    dt = softplus(dt + dt_bias)
    ys = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)  # (B, E, N)
        state = decay * state + (dt[:, t] * u[:, t]).unsqueeze(-1) * B[:, t, None, :]
        ys.append((state * C[:, t, None, :]).sum(-1))
    y = (torch.stack(ys, dim=1) + D * u) * silu(z)
    return out.land(y), state
