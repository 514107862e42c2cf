"""Reference: one step a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from squamata.kernels.decay import DecaySites
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.site import Site


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, z: Value, dt_bias: Tensor, state: Tensor, out: Site,
    sites: DecaySites | None = None,
) -> tuple[Value, Tensor]:  # fmt: skip
    """The contract's, and with ``sites`` the decay as they represent it, which no other backend has."""
    u, dt, B, C, z = (as_float(value, A.dtype) for value in (u, dt, B, C, z))
    dt = softplus(dt + dt_bias)
    ys = []
    for t, decay in enumerate(_decays(dt, A) if sites is None else sites.each(dt, A)):
        state = decay * state + (dt[:, t] * u[:, t]).unsqueeze(-1) * B[:, t, None, :]
        ys.append((state * C[:, t, None, :]).sum(-1))
    y = (torch.stack(ys, dim=1) + D * u) * silu(z)
    return out.land(y), state


def _decays(dt: Tensor, A: Tensor) -> Iterator[Tensor]:
    """exp(dt A) of every token, (B, E, N)."""
    return (torch.exp(dt[:, t, :, None] * A) for t in range(dt.shape[1]))
