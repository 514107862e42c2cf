"""The numbers of a group's grid, and rounding to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8  # of any group: what is all zero has a scale too


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
    """Round to integers: ties to even, ties away from zero, towards zero; or *stochastic*: up with a probability equal
    to the fraction, by torch's generator."""
    if rounding == "half-even":
        return torch.round(x)
    if rounding == "half-away":
        return torch.copysign(torch.floor(x.abs() + 0.5), x)
    if rounding == "stochastic":
        return torch.floor(x + torch.rand_like(x))
    return torch.trunc(x)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block stochastic rounding repeats itself: torch's generators start at a seed, and are put back."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        yield
