"""Codecs: what the integers of a number format mean. A format is two functions and one entry in ``CODECS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squamata.spec.quant import QuantSpec


@dataclass(frozen=True)
class Codec:
    """``encode(x, grid, spec)``: float -> codes, still in float, with a straight-through gradient.
    ``decode(codes, scale, second, spec, dtype)``: codes (zero point already taken off) -> values.

    A group has a scale, and a second number if ``QuantSpec.second`` names one: what it means is the codec's business.
    """

    encode: Callable[[Tensor, Grid, QuantSpec], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor | None, QuantSpec, torch.dtype], Tensor]


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


def encode_uniform(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """clamp(round(x * inverse) + zero). The definition every kernel must agree with."""
    scaled = x.float() * grid.inverse
    rounded = round_codes(scaled, spec.rounding)
    if scaled.requires_grad:
        rounded = scaled + (rounded - scaled).detach()
    return (rounded if grid.second is None else rounded + grid.second).clamp(*spec.code_range)


def decode_uniform(
    codes: Tensor, scale: Tensor, _second: Tensor | None, _spec: QuantSpec, dtype: torch.dtype
) -> Tensor:
    """codes * scale."""
    return codes.to(dtype) * scale.to(dtype)


CODECS: dict[str, Codec] = {"uniform": Codec(encode_uniform, decode_uniform)}


def round_codes(x: Tensor, rounding: str) -> Tensor:
    """Round to integers: ties to even, ties away from zero, or towards zero."""
    if rounding == "half-even":
        return torch.round(x)
    if rounding == "half-away":
        return torch.copysign(torch.floor(x.abs() + 0.5), x)
    return torch.trunc(x)


def range_to_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Smallest and largest value a group must represent -> scale and, if asymmetric, zero point.

    Symmetric: scale = max(|low|, |high|) / span, at least 1e-8.
    """
    if spec.symmetric:
        return (torch.maximum(low.abs(), high.abs()) / spec.span).clamp_min(1e-8), None
    smallest, largest = spec.code_range
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (largest - smallest)).clamp_min(1e-8)
    return scale, (smallest - torch.round(low / scale)).clamp(smallest, largest)
