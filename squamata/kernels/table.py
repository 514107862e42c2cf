"""The codec of a weight each row of which has its own levels: (rows, 2^bits) values, rising, in the scale's place."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.grid import Grid
from squamata.spec.quant import QuantSpec


def encode(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """The place of the nearest level in the row's table, the lower of two as near: x (N, K), table (N, 2^bits)."""
    halfway = (grid.scale[:, 1:] + grid.scale[:, :-1]) / 2
    return torch.searchsorted(halfway.contiguous(), x.float().contiguous()).float()


def decode(codes: Tensor, table: Tensor, _second: Tensor | None, _spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """table[row, code]."""
    return torch.gather(table.to(dtype), 1, codes.long())


def beyond(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Values below the first or above the last level of their row."""
    return (x < grid.scale[:, :1]) | (x > grid.scale[:, -1:])
