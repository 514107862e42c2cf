"""Codecs of sign and magnitude: the formats of ``spec.formats``, encoded to the nearest level and decoded by table.

Gradients pass straight through between the outermost levels: d value / d x = 1. That of the scale is LSQ's,
level - x / scale; the second number gets only its own factor.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from squamata.kernels.grid import SMALLEST_SCALE, Grid, round_codes
from squamata.spec.formats import EXPONENTS, levels
from squamata.spec.quant import QuantSpec


@cache
@torch.inference_mode(False)  # what is kept must serve whoever wants gradients, too
def tables(codec: str, bits: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """``fine`` and ``coarse`` of every magnitude, float32."""
    fine, coarse = levels(codec, bits)
    found = [
        None if part is None else torch.tensor(part, dtype=torch.float32, device=device) for part in (fine, coarse)
    ]
    assert found[0] is not None
    return found[0], found[1]


def encode(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """sign(x) times the magnitude of the nearest level; ties as ``spec.rounding`` says of neighbouring magnitudes."""
    scaled = x.float() * grid.inverse
    with torch.no_grad():
        magnitude = _MAGNITUDES.get(spec.codec, _interpolated)(x.detach().float(), scaled.abs(), grid, spec)
        codes = magnitude if spec.absolute else torch.copysign(magnitude, scaled)
    if scaled.requires_grad:
        low, high = outermost(grid.scale, grid.second, spec)
        inside = (x.detach() >= low) & (x.detach() <= high)
        codes = codes + torch.where(inside, scaled - scaled.detach(), 0.0)
    return codes


def decode(codes: Tensor, scale: Tensor, second: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """(fine[m] * scale + coarse[m] * second) with the sign of the code."""
    fine, coarse = tables(spec.codec, spec.bits, codes.device)
    magnitude = codes.detach().abs().long()
    sign = codes.detach().sign().to(dtype)
    values = sign * fine[magnitude].to(dtype) * scale.to(dtype)
    if coarse is not None:
        assert second is not None
        values = values + sign * coarse[magnitude].to(dtype) * second.to(dtype)
    if codes.requires_grad:
        values = values + (codes - codes.detach()).to(dtype) * scale.to(dtype)
    return values


def beyond(x: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Values farther than half the last step from the outermost level."""
    fine, coarse = tables(spec.codec, spec.bits, x.device)
    _, high = outermost(grid.scale, grid.second, spec)
    step = (fine[-1] - fine[-2]) * grid.scale
    if spec.absolute:
        return (x < -(fine[1] * grid.scale) / 2) | (x > high + step / 2)
    if coarse is not None and grid.second is not None:
        step = step + (coarse[-1] - coarse[-2]) * grid.second
    return x.abs() > high + step / 2


def outermost(scale: Tensor, second: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value that the groups can represent."""
    fine, coarse = tables(spec.codec, spec.bits, scale.device)
    high = fine.max() * scale
    if coarse is not None and second is not None:
        high = torch.maximum(high, fine[-1] * scale + coarse[-1] * second)
    return torch.zeros_like(high) if spec.absolute else -high, high


def second_number(scale: Tensor, largest: Tensor, spec: QuantSpec) -> Tensor:
    """What lets a group whose threshold is span * scale also represent ``largest``: step of its tail or coarse grid."""
    fine, coarse = levels(spec.codec, spec.bits)
    assert coarse is not None
    return ((largest - fine[-1] * scale) / coarse[-1]).clamp_min(SMALLEST_SCALE)


def of_tokens(x: Tensor, grid: Grid, spec: QuantSpec) -> Grid:
    """The grid with a second number taken from every token of x (..., features)."""
    largest = x.detach().float().abs().amax(-1, keepdim=True)
    return grid._replace(second=second_number(torch.zeros((), device=x.device), largest, spec))


def _interpolated(x: Tensor, y: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """The table's inverse, linear between levels: rounding it gives the nearest level."""
    fine, _ = tables(spec.codec, spec.bits, x.device)
    below = (torch.searchsorted(fine, y.contiguous(), right=True) - 1).clamp_max(len(fine) - 2)
    between = (y - fine[below]) / (fine[below + 1] - fine[below])
    return round_codes(below + between, spec.rounding).clamp_max(len(fine) - 1)


def _piecewise(x: Tensor, y: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    assert grid.second is not None
    knee, top = spec.span, spec.code_range[1]
    above = (x.abs() - knee * grid.scale).clamp_min(0.0) / grid.second
    return round_codes(y.clamp_max(knee) + above, spec.rounding).clamp_max(top)


def _dual(x: Tensor, y: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Whichever grid comes nearer, the fine one if both come as near."""
    assert grid.second is not None
    top = spec.span
    fine = round_codes(y, spec.rounding).clamp_max(top)
    coarse = round_codes(x.abs() / grid.second, spec.rounding).clamp_max(top)
    nearer = (coarse * grid.second - x.abs()).abs() < (fine * grid.scale - x.abs()).abs()
    return torch.where(nearer & (coarse > 0), top + coarse, fine)


def _complement(x: Tensor, y: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """round(-log2(1 - x)), in steps that the bits say (QMamba's LtSQ; in float64, so that 1 - x is exact)."""
    fine, _ = tables(spec.codec, spec.bits, x.device)
    step = -torch.log2(1.0 - fine[1].double())
    missing = (1.0 - x.double()).clamp(2.0 ** -(EXPONENTS + 1), 1.0)
    return round_codes(-torch.log2(missing) / step, spec.rounding).clamp(0, len(fine) - 1).float()


def _fixed(x: Tensor, y: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    return round_codes(x * 2**spec.bits, spec.rounding).clamp(*spec.code_range)


_LOGARITHMIC = dict.fromkeys(("ltsq", "ltsq-fine"), _complement)
_MAGNITUDES = {
    "outlier-piecewise": _piecewise,
    "dual-scale": _dual,
    "dynamic-outlier": _dual,
    "fixed": _fixed,
    **_LOGARITHMIC,
}
