"""Reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from squamata.kernels.causal_conv1d import factored
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site


def run(
    inputs: Sequence[Value], weight: Value, bias: Tensor | None, state: Value, out: Sequence[Site]
) -> tuple[Value, ...]:
    if isinstance(state, QTensor):
        codes = torch.cat([x.data for x in inputs if isinstance(x, QTensor)], dim=-1)
        history = _advance(state.data, codes)
        taps, scale = factored(weight, state)
        y = _convolve(history, taps) * scale.reshape(-1)
    else:
        x = torch.cat([as_float(value, state.dtype) for value in inputs], dim=-1)
        y = _convolve(_advance(state, x), as_float(weight, state.dtype))
    y = silu(y if bias is None else y + bias)
    sizes = [value.shape[-1] for value in inputs]
    return tuple(site.land(part) for site, part in zip(out, y.split(sizes, dim=-1), strict=True))


def _advance(state: Tensor, x: Tensor) -> Tensor:
    """History (B, C, K - 1 + L): the state, then the inputs (B, L, C); the state becomes its last K - 1 columns."""
    history = torch.cat([state, x.transpose(1, 2).to(state.dtype)], dim=-1)
    if state.shape[-1]:
        state.copy_(history[..., -state.shape[-1] :].detach())
    return history


def _convolve(history: Tensor, weight: Tensor) -> Tensor:
    """sum_k history[..., t + k] weight[:, k] as (B, L, C); exact for integer codes (K * 128 * 128 < 2^24)."""
    width = weight.shape[-1]
    length = history.shape[-1] - width + 1
    history = history if history.dtype.is_floating_point else history.float()
    total = sum(history[..., tap : tap + length] * weight[:, tap, None].to(history.dtype) for tap in range(width))
    assert isinstance(total, Tensor)
    return total.transpose(1, 2)
