# mypy: allow-untyped-defs
"""The row-wise kernels of a decode step: residual and RMS norm; gate, gate norm and rotation."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import let_next_start, to_codes, wait_for_previous
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.matrices import hadamard_matrix

ROTATE_WARPS = 4
GATE_PART, GATE_WARPS = 256, 16  # channels and warps of a program, without a rotation
_SMALLEST_SCALE = tl.constexpr(1e-8)  # of a dynamic site, as in site.range_to_scale
_SPAN_16 = tl.constexpr(32512.0)  # 256 * 127: a 16-bit code is 256 times one int8 plus another


@dataclass(frozen=True)
class RowSite:
    """A site that a whole row lands on: float, int8 with one static scale, or int8 with the row's own scale.

    ``scale`` is used with ``span`` 0; a ``span`` above 0 means dynamic: absmax / span.
    """

    quantized: bool = False
    scale: float = 1.0
    inverse: float = 1.0
    low: float = -127.0
    high: float = 127.0
    span: float = 0.0
    rounding: int = 0

    def empty(self, rows: int, features: int, device: torch.device | str) -> Tensor:
        """Memory for rows that land here."""
        return torch.zeros(rows, features, dtype=torch.int8 if self.quantized else torch.float32, device=device)


@triton.jit
def _land_row(y, out, out_scale, row, offsets, mask, inverse, low, high, span, QUANTIZED: tl.constexpr,
              DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip
    if QUANTIZED:
        if DYNAMIC:
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(y), axis=0), span), _SMALLEST_SCALE)
            tl.store(out_scale + row, scale)
            inverse = tl.div_rn(1.0, scale)
        tl.store(out + offsets, to_codes(y, inverse, low, high, ROUNDING).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + offsets, y, mask=mask)


@triton.jit
def _land_halves(y, largest, out, out_scale, row, offsets, mask, WIDTH):
    """y in 16 bits, its row's own scale: the upper halves first, the lower WIDTH bytes on.

    The scale that is stored knows that 4-bit codes sit in the upper half of a byte (``gpu.tiles``).
    """
    scale = tl.maximum(largest / _SPAN_16, _SMALLEST_SCALE)
    tl.store(out_scale + row, scale * 0.0625)
    code = to_codes(y, 1.0 / scale, -_SPAN_16, _SPAN_16, 0)
    upper = tl.floor((code + 128.0) * 0.00390625)
    tl.store(out + offsets, upper.to(tl.int8), mask=mask)
    tl.store(out + WIDTH + offsets, (code - 256.0 * upper).to(tl.int8), mask=mask)


@triton.jit
def _norm_kernel(h, residual, weight, out, out_scale, D, epsilon, inverse, low, high, span,
                 FIRST: tl.constexpr, QUANTIZED: tl.constexpr, DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr,
                 HALVES: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BD)
    mask = column < D
    gain = tl.load(weight + column, mask=mask, other=0.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    offsets = row * D + column
    x = tl.load(h + offsets, mask=mask, other=0.0)
    if not FIRST:
        x += tl.load(residual + offsets, mask=mask, other=0.0)
    tl.store(residual + offsets, x, mask=mask)
    length = tl.rsqrt(tl.sum(x * x, axis=0) / D + epsilon)
    y = x * length * gain
    if HALVES:
        largest = tl.max(tl.abs(x * gain), axis=0) * length  # both sums over the row at once
        _land_halves(y, largest, out, out_scale, row, row * (2 * D) + column, mask, D)
    else:
        _land_row(y, out, out_scale, row, offsets, mask, inverse, low, high, span, QUANTIZED, DYNAMIC, ROUNDING)


def norm(h: Tensor, residual: Tensor, weight: Tensor, epsilon: float, site: RowSite, out: Tensor,
         out_scale: Tensor | None, first: bool, pdl: bool) -> None:  # fmt: skip
    """residual += h (``first``: residual = h); out = RMS norm of it times weight, landed. float32 (rows, D).

    An ``out`` of 2 D columns takes it in 16 bits, its scale in ``out_scale``.
    """
    rows, width = h.shape
    _norm_kernel[(rows,)](
        h, residual, weight, out, out_scale if out_scale is not None else residual, width, epsilon,
        site.inverse, site.low, site.high, site.span, FIRST=first, QUANTIZED=site.quantized, DYNAMIC=site.span > 0,
        ROUNDING=site.rounding, HALVES=out.shape[1] == 2 * width, BD=triton.next_power_of_2(width), PDL=pdl,
        num_warps=16 if width > 2048 else 8,
        **_launch(pdl),
    )  # fmt: skip


@dataclass(frozen=True)
class RotationPlan:
    """H_M (x) H_P over ``blocks`` blocks of M * P channels: a program makes one row of M, P outputs.

    ``mix``: float32 (M, M), entries +-1; ``left`` (a, a), ``right`` (b, b) with a * b = P: the butterflies of P as two
    small products. Without a rotation ``mix`` is the identity and ``left``, ``right`` are not applied.
    """

    blocks: int
    mix: Tensor
    left: Tensor
    right: Tensor
    factor: float
    rotated: bool

    @property
    def parts(self) -> int:
        return int(self.mix.shape[0])

    @property
    def part(self) -> int:
        return int(self.left.shape[0] * self.right.shape[0])


def plan_rotation(rotation: Rotation | None, size: int, device: torch.device | str) -> RotationPlan:
    """Split a rotation (or none) of ``size`` channels into parts of at most 256 channels."""
    if rotation is None:
        part = next(width for width in (256, 128, 64, 32, 16, 8, 4, 2, 1) if size % width == 0)
        a, b = _square(part)
        one = torch.ones(1, 1, device=device)
        return RotationPlan(size // part, one, torch.eye(a, device=device), torch.eye(b, device=device), 1.0, False)
    order, power = rotation.parts
    part = next(size for size in (256, 16, 1) if power >= size)
    with torch.device("cpu"):
        rest = hadamard_matrix(power // part)
        mix = torch.kron(rotation.base, rest) if order > 1 else rest
        left, right = (hadamard_matrix(side).to(device) for side in _square(part))
    blocks = rotation.size // rotation.block
    return RotationPlan(blocks, mix.contiguous().to(device), left, right, rotation.block**-0.5, True)


def _square(part: int) -> tuple[int, int]:
    """The two sides of a part: 16 by 16 for the matrix unit, else one row."""
    return (16, 16) if part == 256 else (1, part)


@triton.jit
def _gated(y, gate, place, mask, GATED: tl.constexpr):
    value = tl.load(y + place, mask=mask, other=0.0)
    return value * tl.load(gate + place, mask=mask, other=0.0) if GATED else value


@triton.jit
def _mix_whole(row, gate, gain, signs, within, epsilon, E: tl.constexpr, PARTS: tl.constexpr, AB: tl.constexpr,
               GATED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row of the mixing matrix times the parts of a whole row, normed: a part after the other, none padded.

    The norm is one number, so the sum need not wait for it.
    """
    factors = ()
    for j in tl.static_range(PARTS):
        gain_ = tl.load(gain + j * AB + within) if NORM else 1.0
        factors = factors + (tl.load(signs + j) * gain_,)  # type: ignore[assignment]  # noqa: RUF005
    let_next_start(PDL)
    wait_for_previous(PDL)
    parts = ()
    for j in tl.static_range(PARTS):
        part = _gated(row, gate, j * AB + within, within >= 0, GATED)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    mixed, squares = tl.zeros((AB,), tl.float32), tl.zeros((AB,), tl.float32)
    for j in tl.static_range(PARTS):
        mixed += parts[j] * factors[j]
        squares += parts[j] * parts[j]
    if NORM:
        mixed = mixed * tl.rsqrt(tl.sum(squares, axis=0) / E + epsilon)
    return mixed


@triton.jit
def _mix_tile(y_rows, gate, gain, mix, at, row, within, epsilon, middle_inverse, middle_scale, middle_low, middle_high,
              E: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
              AB: tl.constexpr, BE: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, MIDDLE: tl.constexpr,
              MIDDLE_ROUNDING: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The same for any number of blocks and groups, and with a site in the middle."""
    block = at // PARTS
    j = tl.arange(0, PARTS_PADDED)
    signs = tl.load(mix + (at % PARTS) * PARTS + j, mask=j < PARTS, other=0.0)
    channel = (block * PARTS + j)[:, None] * AB + within[None, :]
    mask = (j < PARTS)[:, None] & (within >= 0)[None, :]
    weight = tl.load(gain + channel, mask=mask, other=0.0) if NORM else 1.0
    let_next_start(PDL)
    wait_for_previous(PDL)
    y = _gated(y_rows, gate, row * E + channel, mask, GATED)
    if NORM:
        width: tl.constexpr = E // GROUPS
        if GROUPS == 1 and PARTS * AB == E:  # the tile is the whole row
            y = y * tl.rsqrt(tl.sum(tl.sum(y * y, axis=1), axis=0) / width + epsilon)
        elif PARTS * AB == E and PARTS_PADDED % GROUPS == 0 and PARTS == PARTS_PADDED:
            squares = tl.reshape(tl.sum(y * y, axis=1), (GROUPS, PARTS // GROUPS))
            scale = tl.rsqrt(tl.sum(squares, axis=1) / width + epsilon)
            spread = tl.broadcast_to(scale[:, None], (GROUPS, PARTS // GROUPS))
            y = y * tl.reshape(spread, (PARTS,))[:, None]
        else:
            for group in tl.static_range(GROUPS):
                lane = tl.arange(0, BE)
                member = _gated(y_rows, gate, row * E + group * width + lane, lane < width, GATED)
                scale = tl.rsqrt(tl.sum(member * member, axis=0) / width + epsilon)
                y = tl.where(channel // width == group, y * scale, y)
        y = y * weight
    if MIDDLE:
        y = to_codes(y, middle_inverse, middle_low, middle_high, MIDDLE_ROUNDING) * middle_scale
    return tl.sum(y * signs[:, None], axis=0)


@triton.jit
def _rotate_kernel(y, gate, gain, mix, left, right, out, out_scale, factor, epsilon, inverse, low, high, span,
                   middle_inverse, middle_scale, middle_low, middle_high,
                   E: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
                   A: tl.constexpr,
                   B: tl.constexpr, BE: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ROTATED: tl.constexpr,
                   MIDDLE: tl.constexpr, MIDDLE_ROUNDING: tl.constexpr,
                   QUANTIZED: tl.constexpr, ROUNDING: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One part (A * B outputs) of one row: out = H (norm(y gate) * gain) * factor, landed."""
    at = tl.program_id(0)
    row = tl.program_id(1)
    within = tl.arange(0, A * B)
    H_left = tl.load(left + tl.arange(0, A)[:, None] * A + tl.arange(0, A)[None, :])
    H_right = tl.load(right + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
    if PARTS * A * B == E and GROUPS == 1 and PARTS < PARTS_PADDED and not MIDDLE:
        mixed = _mix_whole(y + row * E, gate + row * E, gain, mix + at * PARTS, within, epsilon, E, PARTS, A * B,
                           GATED, NORM, PDL)  # fmt: skip
    else:
        mixed = _mix_tile(y, gate, gain, mix, at, row, within, epsilon, middle_inverse, middle_scale, middle_low,
                          middle_high, E, GROUPS, PARTS, PARTS_PADDED, A * B, BE, GATED, NORM, MIDDLE,
                          MIDDLE_ROUNDING, PDL)  # fmt: skip
    if ROTATED:
        if A == 16:
            square = tl.reshape(mixed, (A, B))
            square = tl.dot(tl.dot(H_left, square, input_precision="ieee"), H_right, input_precision="ieee")
            mixed = tl.reshape(square, (A * B,))
        elif B > 1:
            mixed = tl.sum(mixed[:, None] * H_right, axis=0)
        mixed = mixed * factor
    place = row * E + at * (A * B) + within
    _land_row(mixed, out, out_scale, row, place, within >= 0, inverse, low, high, span, QUANTIZED, False, ROUNDING)


@triton.jit
def _gate_norm_kernel(rows, gate, gain, out, out_scale, epsilon, inverse, low, high, span, middle_inverse, middle_scale,
                      middle_low, middle_high, E: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
                      TAKEN: tl.constexpr, BW: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
                      MIDDLE: tl.constexpr, MIDDLE_ROUNDING: tl.constexpr, QUANTIZED: tl.constexpr,
                      HALVES: tl.constexpr, ROUNDING: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """PART channels of one row, from the group of WIDTH that they lie in, or (HALVES: for its maximum) from all."""
    first = tl.program_id(0) * PART
    row = tl.program_id(1)
    own = first + tl.arange(0, PART)
    own_group = first // WIDTH
    group = tl.arange(0, TAKEN) + (0 if HALVES else own_group)
    lane = tl.arange(0, BW)
    channel = group[:, None] * WIDTH + lane[None, :]
    mask = (channel < E) & (lane < WIDTH)[None, :]
    weight = tl.load(gain + channel, mask=mask, other=0.0) if NORM and HALVES else 1.0
    own_weight = tl.load(gain + own) if NORM else 1.0
    let_next_start(PDL)
    wait_for_previous(PDL)
    part = _gated(rows, gate, row * E + own, own < E, GATED)
    largest = 0.0
    if NORM or HALVES:
        y = _gated(rows, gate, row * E + channel, mask, GATED)
        scale = tl.rsqrt(tl.sum(y * y, axis=1) / WIDTH + epsilon) if NORM else tl.full((TAKEN,), 1.0, tl.float32)
        if HALVES:
            y = y * scale[:, None] * weight
            if MIDDLE:
                y = to_codes(y, middle_inverse, middle_low, middle_high, MIDDLE_ROUNDING) * middle_scale
            largest = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
        part = part * tl.sum(tl.where(group == own_group, scale, 0.0), axis=0) * own_weight
    if MIDDLE:
        part = to_codes(part, middle_inverse, middle_low, middle_high, MIDDLE_ROUNDING) * middle_scale
    if HALVES:
        _land_halves(part, largest, out, out_scale, row, row * (2 * E) + own, own < E, E)
    else:
        _land_row(part, out, out_scale, row, row * E + own, own < E, inverse, low, high, span, QUANTIZED, False,
                  ROUNDING)  # fmt: skip


def _gate_norm(y: Tensor, gate: Tensor | None, gain: Tensor | None, epsilon: float, groups: int,
               middle: RowSite, site: RowSite, out: Tensor, out_scale: Tensor, pdl: bool) -> None:  # fmt: skip
    rows, width = y.shape
    halves = out.shape[1] == 2 * width
    part = gcd(width // groups, GATE_PART)
    group = width // groups if gain is not None else width if halves else part
    _gate_norm_kernel[(width // part, rows)](
        y, gate if gate is not None else y, gain if gain is not None else y, out, out_scale, epsilon, site.inverse,
        site.low, site.high, site.span, middle.inverse, middle.scale, middle.low, middle.high, E=width, WIDTH=group,
        PART=part, TAKEN=triton.next_power_of_2(width // group) if halves else 1, BW=triton.next_power_of_2(group),
        GATED=gate is not None, NORM=gain is not None, MIDDLE=middle.quantized, MIDDLE_ROUNDING=middle.rounding,
        QUANTIZED=site.quantized, HALVES=halves, ROUNDING=site.rounding, PDL=pdl, num_warps=GATE_WARPS, **_launch(pdl),
    )  # fmt: skip


def rotate(y: Tensor, gate: Tensor | None, gain: Tensor | None, epsilon: float, groups: int,
           plan: RotationPlan, middle: RowSite, site: RowSite, out: Tensor, out_scale: Tensor,
           pdl: bool) -> None:  # fmt: skip
    """y gate, RMS norm in groups (none without ``gain``) landed on ``middle``, rotation, landed on ``site``.

    ``site`` is not dynamic.

    Without a rotation, an ``out`` of 2 E columns takes it in 16 bits, its scale in ``out_scale`` (rows,).
    """
    rows, width = y.shape
    if not plan.rotated:
        _gate_norm(y, gate, gain, epsilon, groups, middle, site, out, out_scale, pdl)
        return
    a, b = plan.left.shape[0], plan.right.shape[0]
    _rotate_kernel[(plan.blocks * plan.parts, rows)](
        y, gate if gate is not None else y, gain if gain is not None else y, plan.mix, plan.left, plan.right, out, y,
        plan.factor, epsilon, site.inverse, site.low, site.high, site.span, middle.inverse, middle.scale, middle.low,
        middle.high, E=width, GROUPS=groups, PARTS=plan.parts, PARTS_PADDED=triton.next_power_of_2(plan.parts), A=a,
        B=b, BE=triton.next_power_of_2(width // groups), GATED=gate is not None, NORM=gain is not None,
        ROTATED=plan.rotated, MIDDLE=middle.quantized, MIDDLE_ROUNDING=middle.rounding, QUANTIZED=site.quantized,
        ROUNDING=site.rounding, PDL=pdl, num_warps=ROTATE_WARPS, **_launch(pdl),
    )  # fmt: skip


def _launch(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl and not INTERPRETED else {}
