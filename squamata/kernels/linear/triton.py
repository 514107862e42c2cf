"""float32 activations by any weight on a GPU, for many rows: float32 products on tensor cores (``gpu.pairs``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squamata.kernels.gpu.pairs import HIGH_HIGH_LOW, POSSIBLE, product, split_rows
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.site import Site

FEWEST_ROWS = 256  # below them the weight's own splitting would cost more than it saves


def accepts(x: Value, layer: Linear, out: Sequence[Site | None]) -> bool:
    if not POSSIBLE or not isinstance(x, Tensor) or x.dtype != torch.float32 or not x.is_cuda:
        return False
    return x.numel() >= FEWEST_ROWS * x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)


def run(x: Value, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:
    assert isinstance(x, Tensor)
    if "pairs" not in layer.packed:
        layer.packed["pairs"] = split_rows(as_float(layer.weight).float(), HIGH_HIGH_LOW)
    y = product(x.reshape(-1, x.shape[-1]), layer.packed["pairs"], layer.bias).reshape(*x.shape[:-1], -1)
    parts = y.split(layer.rows, dim=-1)
    return tuple(part if site is None else site.land(part) for part, site in zip(parts, out, strict=True))
