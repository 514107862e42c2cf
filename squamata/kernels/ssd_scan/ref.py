"""Reference: the recurrence for a few tokens, chunks (three products each) for many."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from squamata.kernels.decay import DecaySites
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.ssd_scan import HeadLayout

FEW = 4  # tokens up to which stepping is cheaper than a chunk
FORGOTTEN = -1e4  # exp of it is 0, in float64 too


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, dt_bias: Tensor, state: Tensor, layout: HeadLayout,
    sites: DecaySites | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The contract's, and with ``sites`` the decay as they represent it, which no other backend has."""
    u, dt, B, C = (as_float(value, A.dtype) for value in (u, dt, B, C))
    batch, length, _ = u.shape
    dt = softplus(dt + dt_bias).clamp(*layout.time_step_limit)  # (B, L, H)
    exponent = dt * A if sites is None else sites.logarithm(dt, A)
    u = u.reshape(batch, length, layout.heads, layout.head_dim)
    B = B.reshape(batch, length, layout.groups, layout.d_state)
    C = C.reshape(batch, length, layout.groups, layout.d_state)
    advance = _step if length <= FEW else _chunk
    ys = []
    for start in range(0, length, 1 if length <= FEW else layout.chunk):
        span = slice(start, start + (1 if length <= FEW else layout.chunk))
        y, state = advance(u[:, span], dt[:, span], exponent[:, span], B[:, span], C[:, span], state)
        ys.append(y)
    y = torch.cat(ys, dim=1) + D[:, None] * u
    return y.reshape(batch, length, -1), state


def _step(u: Tensor, dt: Tensor, exponent: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    per_group = state.shape[1] // B.shape[2]
    B = B[:, 0].repeat_interleave(per_group, dim=1)  # (B, H, N)
    C = C[:, 0].repeat_interleave(per_group, dim=1)
    decay = torch.exp(exponent[:, 0]).to(u.dtype)[..., None, None]
    state = decay * state + (dt[:, 0, :, None] * u[:, 0])[..., None] * B[:, :, None, :]
    return (state * C[:, :, None, :]).sum(-1).unsqueeze(1), state


def _chunk(u: Tensor, dt: Tensor, exponent: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of l tokens: inside it as masked attention, the state before it by its decay (section 6)."""
    batch, length, heads, _ = u.shape
    groups = B.shape[2]
    log_decay, between = decays(exponent, u.dtype)
    scores = torch.einsum("btgn,bsgn->bgts", C, B).repeat_interleave(heads // groups, dim=1)
    weighted = (u * dt[..., None]).transpose(1, 2)  # (B, H, l, P)
    inside = (scores * between) @ weighted
    grouped = (batch, groups, heads // groups, *state.shape[2:])
    before = torch.einsum("btgn,bgrpn->bgrtp", C, state.reshape(grouped)).reshape(batch, heads, length, -1)
    y = inside + torch.exp(log_decay).to(u.dtype)[..., None] * before
    to_end = torch.exp(log_decay[..., -1:] - log_decay).to(u.dtype)[..., None] * weighted
    added = torch.einsum("bgrsp,bsgn->bgrpn", to_end.reshape(batch, groups, heads // groups, length, -1), B)
    state = torch.exp(log_decay[..., -1]).to(u.dtype)[..., None, None] * state + added.reshape(state.shape)
    return y.transpose(1, 2), state


def decays(exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dt A of a chunk's tokens (B, l, H) -> float64 log of the decay from before it to token t (B, H, l), and the decay
    from token s to token t (B, H, t, s), 0 before s.

    Decays are differences of sums that grow with the chunk: in float32 their rounding would be the scan's largest
    error by far. A token whose decay is 0 anyway must not grow them beyond what float64 resolves.
    """
    log_decay = exponent.double().clamp_min(FORGOTTEN).cumsum(1).transpose(1, 2)
    between = (log_decay[..., :, None] - log_decay[..., None, :]).to(dtype)
    causal = torch.ones(between.shape[-2:], dtype=torch.bool, device=exponent.device).tril()
    return log_decay, torch.exp(between.masked_fill(~causal, -torch.inf))
