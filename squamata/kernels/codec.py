"""Codecs: what the integers of a number format mean. A format is two functions and one entry in ``CODECS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squamata.kernels import levels, table
from squamata.kernels.grid import SMALLEST_SCALE, Grid, round_codes
from squamata.spec.formats import FORMATS
from squamata.spec.quant import TABLE, QuantSpec

__all__ = ["CODECS", "Codec", "Grid", "range_to_scale", "round_codes"]


@dataclass(frozen=True)
class Codec:
    """``encode(x, grid, spec)``: float -> codes, still in float, with a straight-through gradient.
    ``decode(codes, scale, second, spec, dtype)``: codes (zero point already taken off) -> values.
    ``beyond(x, grid, spec)``: which values lie outside what the codes reach, by more than rounding would.

    A group has a scale, and a second number if ``QuantSpec.second`` names one: what it means is the codec's business.
    ``fit(scale, largest, spec)``: the second number of groups whose threshold gave the scale and whose largest |x| is
    ``largest``. ``live(x, grid, spec)``: the grid with what must be taken from the tensor itself.
    """

    encode: Callable[[Tensor, Grid, QuantSpec], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor | None, QuantSpec, torch.dtype], Tensor]
    beyond: Callable[[Tensor, Grid, QuantSpec], Tensor]
    fit: Callable[[Tensor, Tensor, QuantSpec], Tensor] | None = None
    live: Callable[[Tensor, Grid, QuantSpec], Grid] | None = None


def encode_uniform(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """clamp(round(x * inverse) + zero). The definition every kernel must agree with."""
    scaled = x.float() * grid.inverse
    rounded = round_codes(scaled, spec.rounding)
    codes = (rounded if grid.second is None else rounded + grid.second).clamp(*spec.code_range)
    if scaled.requires_grad:  # the slope of clipping first and rounding then (LSQ, equation 3)
        clipped = (scaled if grid.second is None else scaled + grid.second).clamp(*spec.code_range)
        codes = clipped + (codes - clipped).detach()
    return codes


def decode_uniform(
    codes: Tensor, scale: Tensor, _second: Tensor | None, _spec: QuantSpec, dtype: torch.dtype
) -> Tensor:
    """codes * scale."""
    return codes.to(dtype) * scale.to(dtype)


def beyond_uniform(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Values whose rounded code must be clamped."""
    codes = round_codes(x.float() * grid.inverse, "half-even" if spec.rounding == "stochastic" else spec.rounding)
    codes = codes if grid.second is None else codes + grid.second
    smallest, largest = spec.code_range
    return (codes < smallest) | (codes > largest)


CODECS: dict[str, Codec] = {
    "uniform": Codec(encode_uniform, decode_uniform, beyond_uniform),
    TABLE: Codec(table.encode, table.decode, table.beyond),
} | {
    name: Codec(
        levels.encode,
        levels.decode,
        levels.beyond,
        fit=levels.second_number if form.second is not None else None,
        live=levels.of_tokens if form.live else None,
    )
    for name, form in FORMATS.items()
}


def range_to_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Smallest and largest value a group must represent -> scale and, if asymmetric, zero point.

    Symmetric: scale = max(|low|, |high|) / span, at least 1e-8.
    """
    if spec.symmetric:
        return (torch.maximum(low.abs(), high.abs()) / spec.span).clamp_min(SMALLEST_SCALE), None
    smallest, largest = spec.code_range
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (largest - smallest)).clamp_min(SMALLEST_SCALE)
    return scale, (smallest - torch.round(low / scale)).clamp(smallest, largest)
