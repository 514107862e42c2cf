"""Reference: one step a token; what steps do not wait for is computed for many tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from squamata.kernels.decay import DecaySites
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.site import Site

MOST, AT_ONCE = 64, 2**26  # tokens, and numbers of their states, that are computed together


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, z: Value, dt_bias: Tensor, state: Tensor, out: Site,
    sites: DecaySites | None = None,
) -> tuple[Value, Tensor]:  # fmt: skip
    """The contract's, and with ``sites`` the decay as they represent it, which no other backend has."""
    u, dt, B, C, z = (as_float(value, A.dtype) for value in (u, dt, B, C, z))
    dt = softplus(dt + dt_bias)
    ys = []
    at_once = tokens_at_once(state)
    for start in range(0, u.shape[1], at_once):
        some = slice(start, start + at_once)
        y, state = _steps(dt[:, some], u[:, some], A, B[:, some], C[:, some], state, sites)
        ys.append(y)
    y = (torch.cat(ys, dim=1) + D * u) * silu(z)
    return out.land(y), state


def tokens_at_once(state: Tensor) -> int:
    """How many states (B, E, N) are held at a time."""
    return max(1, min(MOST, AT_ONCE // max(1, state.numel())))


def _steps(
    dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, sites: DecaySites | None
) -> tuple[Tensor, Tensor]:
    """y (B, l, E) of consecutive tokens, and the last state."""
    decays = torch.exp(dt[..., None] * A).unbind(1) if sites is None else sites.each(dt, A)  # (B, E, N) a token
    added = (dt * u)[..., None] * B[:, :, None, :]
    states = []
    for decay_t, added_t in zip(decays, added.unbind(1), strict=True):
        state = decay_t * state + added_t
        states.append(state)
    return (torch.stack(states, dim=1) * C[:, :, None, :]).sum(-1), state
