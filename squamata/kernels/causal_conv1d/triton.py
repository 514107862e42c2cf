"""float32 on a GPU: one pass over every input (``gpu.float32``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squamata.kernels.gpu.float32 import convolve
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.site import Site


def accepts(inputs: Sequence[Value], weight: Value, bias: Tensor | None, state: Value, out: Sequence[Site]) -> bool:
    values = [*inputs, state]
    if not all(isinstance(x, Tensor) and x.is_cuda and x.dtype == torch.float32 for x in values):
        return False
    return not torch.is_grad_enabled()


def run(
    inputs: Sequence[Value], weight: Value, bias: Tensor | None, state: Value, out: Sequence[Site]
) -> tuple[Value, ...]:
    assert isinstance(state, Tensor)
    taps, first = as_float(weight).contiguous(), 0
    landed, tails = [], []
    for x, site in zip(inputs, out, strict=True):
        assert isinstance(x, Tensor)
        landed.append(site.land(convolve(x, state, taps, bias, first)))
        channels, kept = slice(first, first + x.shape[-1]), state.shape[-1]
        tails.append(torch.cat([state[:, channels], x[:, -kept:].transpose(1, 2)], -1)[..., -kept:] if kept else state)
        first += x.shape[-1]
    if state.shape[-1]:
        state.copy_(torch.cat(tails, 1))
    return tuple(landed)
