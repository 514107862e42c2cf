"""Codecs: what the integers of a number format mean. A format is two functions and one entry in ``CODECS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squamata.spec.quant import QuantSpec


@dataclass(frozen=True)
class Codec:
    """``encode(x, inverse_scale, zero, spec)``: float -> codes, still in float, with a straight-through gradient.
    ``decode(codes, scale, dtype)``: codes (zero point already taken off) -> values.
    """

    encode: Callable[[Tensor, Tensor, Tensor | None, QuantSpec], Tensor]
    decode: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def encode_uniform(x: Tensor, inverse: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """clamp(round(x * inverse) + zero). The definition every kernel must agree with."""
    scaled = x.float() * inverse
    rounded = round_codes(scaled, spec.rounding)
    codes = (rounded if zero is None else rounded + zero).clamp(*spec.code_range)
    if scaled.requires_grad:  # the slope of clipping first and rounding then (LSQ, equation 3)
        clipped = (scaled if zero is None else scaled + zero).clamp(*spec.code_range)
        codes = clipped + (codes - clipped).detach()
    return codes


def decode_uniform(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
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
