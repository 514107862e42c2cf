"""The numbers of a group's grid, and rounding to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The numbers of every group, float32, broadcastable: scale, its reciprocal (float32 1 / scale: what every backend
    multiplies with), and the codec's second number.
    """

    scale: Tensor
    inverse: Tensor
    second: Tensor | None = None

    @classmethod
    def of(cls, scale: Tensor, second: Tensor | None = None) -> Grid:
        return cls(scale, 1.0 / scale, second)


def round_codes(x: Tensor, rounding: str) -> Tensor:
    """Round to integers: ties to even, ties away from zero, or towards zero."""
    if rounding == "half-even":
        return torch.round(x)
    if rounding == "half-away":
        return torch.copysign(torch.floor(x.abs() + 0.5), x)
    return torch.trunc(x)
