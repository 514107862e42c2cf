# mypy: allow-untyped-defs
"""Row-wise kernels for many tokens: norm of the residual; gate, gate norm and rotation of the scan's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.gpu.gemm import permuted
from squamata.kernels.gpu.math import silu, to_codes
from squamata.kernels.gpu.norm import RowSite, _land_row
from squamata.kernels.gpu.scan import InputPlan
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.matrices import hadamard_matrix

WIDEST_SIDE = 128  # channels of a row that one small product turns
ROTATE_WARPS = 4
_HEADROOM = tl.constexpr(0.0625)  # float16 between the two products of a rotation: a power of two


@triton.jit
def _norm_kernel(residual, weight, out, out_scale, D, epsilon, inverse, low, high, span, FORMAT: tl.constexpr,
                 QUANTIZED: tl.constexpr, DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr,
                 BD: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    mask = column < D
    x = tl.load(residual + row * D + column, mask=mask, other=0.0)
    gain = tl.load(weight + column, mask=mask, other=0.0)
    y = x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=0) / D + epsilon)) * gain
    if QUANTIZED:
        _land_row(y, out, out_scale, row, row * D + column, mask, inverse, low, high, span, True, DYNAMIC, ROUNDING)
    else:
        tl.store(out + row * D + permuted(column, FORMAT), y.to(out.dtype.element_ty), mask=mask)


def norm_rows(residual: Tensor, weight: Tensor, epsilon: float, site: RowSite, out: Tensor, out_scale: Tensor,
              format: int) -> None:  # fmt: skip
    """out = RMS norm of the residual (M, D) float32 times weight, landed, in the column order of ``format``."""
    rows, width = residual.shape
    _norm_kernel[(rows,)](
        residual, weight, out, out_scale, width, epsilon, site.inverse, site.low, site.high, site.span, FORMAT=format,
        QUANTIZED=site.quantized, DYNAMIC=site.span > 0, ROUNDING=site.rounding, BD=triton.next_power_of_2(width),
        num_warps=8 if width > 1024 else 4,
    )  # fmt: skip


@dataclass(frozen=True)
class RowRotation:
    """A rotation of whole rows as two products: ``left`` (parts, parts), row (parts, side), ``right`` (side, side).

    H_m (x) H_{2^k} with ``side`` of the 2^k; ``left`` is padded to a power of two of at least 16, block-diagonal if the
    rotation is. ``left`` and ``right``: float16, or float32 for a check. ``turned``: ``right`` does anything.
    """

    left: Tensor
    right: Tensor
    parts: int
    factor: float
    rotated: bool = True
    turned: bool = True


def plan_row_rotation(
    rotation: Rotation | None, size: int, exact: bool, device: torch.device | str, format: int = 0
) -> RowRotation:
    """SquamataError if the rotation's power of two is below 16. Outputs come in the column order of ``format``, which
    is ``right``'s business; without a rotation it does nothing else.
    """
    dtype = torch.float32 if exact else torch.float16
    if rotation is None:
        side = next((width for width in (128, 64, 32, 16) if size % width == 0), 0)
    else:
        side = min(rotation.parts[1], WIDEST_SIDE)
    if side < 16:
        raise SquamataError(f"the GPU kernels take inner sizes that are multiples of 16, not {size}: run on the CPU")
    with torch.device("cpu"):
        left, right, moved = _row_matrices(rotation, size, side, format)
    factor = 1.0 if rotation is None else rotation.block**-0.5
    parts = size // side
    left, right = left.to(device, dtype), right.to(device, dtype)
    return RowRotation(left, right, parts, factor, rotation is not None, moved)


def _row_matrices(rotation: Rotation | None, size: int, side: int, format: int) -> tuple[Tensor, Tensor, bool]:
    """``left``, ``right`` with its columns in the order of ``format``, and whether ``right`` does anything."""
    parts = size // side
    padded = max(16, triton.next_power_of_2(parts))
    left, right = torch.zeros(padded, padded), torch.eye(side)
    if rotation is not None:
        right = hadamard_matrix(side)
        mix = torch.kron(rotation.base, hadamard_matrix(rotation.parts[1] // side))
        left[:parts, :parts] = torch.kron(torch.eye(rotation.size // rotation.block), mix)
    places = permuted.fn(torch.arange(side), format)
    placed = torch.zeros(side, side)
    placed[:, places] = right.T
    return left, placed, rotation is not None or not torch.equal(places, torch.arange(side))


@triton.jit
def _rotate_kernel(y, z_codes, z_values, z_scale, gain, left, right, out, factor, epsilon, inverse, low, high,
                   middle_inverse, middle_scale, middle_low, middle_high, N_IN, Z_START: tl.constexpr, E: tl.constexpr,
                   PARTS: tl.constexpr, PADDED: tl.constexpr, SIDE: tl.constexpr, GROUPS: tl.constexpr,
                   Z_CODES: tl.constexpr, NORM: tl.constexpr, ROTATED: tl.constexpr, TURNED: tl.constexpr,
                   MIDDLE: tl.constexpr,
                   MIDDLE_ROUNDING: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDING: tl.constexpr,
                   EXACT: tl.constexpr):  # fmt: skip
    """One row: out = H (norm(y * SiLU(z)) * gain) * factor, landed."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    channel = part[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    mask = channel < E
    v = tl.load(y + row * E + channel, mask=mask, other=0.0).to(tl.float32)
    if Z_CODES:
        z = tl.load(z_codes + row * N_IN + Z_START + channel, mask=mask, other=0).to(tl.float32)
        z = z * tl.load(z_scale + channel, mask=mask, other=0.0)
    else:
        z = tl.load(z_values + row * N_IN + Z_START + channel, mask=mask, other=0.0).to(tl.float32)
    v = v * silu(z)
    if NORM:
        width: tl.constexpr = E // GROUPS
        squares = tl.sum(v * v, axis=1)
        if GROUPS == 1:
            v = v * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=0) / width + epsilon))
        elif PARTS % GROUPS == 0:
            scale = tl.zeros((PADDED,), tl.float32)
            for group in tl.static_range(GROUPS):
                member = part // (PARTS // GROUPS) == group
                mean = tl.sum(tl.where(member, squares, 0.0), axis=0) / width
                scale = tl.where(member, tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon)), scale)
            v = v * scale[:, None]
        else:
            whole = v * v
            for group in tl.static_range(GROUPS):
                member = channel // width == group
                mean = tl.sum(tl.sum(tl.where(member, whole, 0.0), axis=1), axis=0) / width
                v = tl.where(member, v * tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon)), v)
        v = v * tl.load(gain + channel, mask=mask, other=0.0)
    if MIDDLE:
        v = to_codes(v, middle_inverse, middle_low, middle_high, MIDDLE_ROUNDING) * middle_scale
    if TURNED:
        unit = 1.0
        if not NORM and not EXACT:  # float16 has no room for any magnitude: the row's largest becomes 1
            unit = tl.maximum(tl.max(tl.max(tl.abs(v), axis=1), axis=0), 1e-20)
            v = v * tl.div_rn(1.0, unit)
        side = tl.arange(0, SIDE)
        H_right = tl.load(right + side[:, None] * SIDE + side[None, :])
        v = tl.dot(v.to(H_right.dtype), H_right, input_precision="ieee")
        if ROTATED:
            H_left = tl.load(left + part[:, None] * PADDED + part[None, :])
            v = tl.dot(H_left, (v * _HEADROOM).to(H_left.dtype), input_precision="ieee") / _HEADROOM
        v = v * (factor * unit)
    if QUANTIZED:
        tl.store(out + row * E + channel, to_codes(v, inverse, low, high, ROUNDING).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + row * E + channel, v.to(out.dtype.element_ty), mask=mask)


def rotate_rows(y: Tensor, z: tuple[Tensor, Tensor], z_input: InputPlan, z_start: int, gain: Tensor | None,
                epsilon: float, groups: int, plan: RowRotation, middle: RowSite, site: RowSite,
                out: Tensor) -> None:  # fmt: skip
    """Gate, RMS norm in groups (none without ``gain``) landed on ``middle``, rotation, landed on ``site``.

    ``y``: (M, E), float16 or float32; ``z``: codes and values of in_proj's outputs, (M, N) both.
    """
    rows, width = y.shape
    _rotate_kernel[(rows,)](
        y, *z, z_input.scale, gain if gain is not None else plan.left, plan.left, plan.right, out, plan.factor, epsilon,
        site.inverse, site.low, site.high, middle.inverse, middle.scale, middle.low, middle.high, z[0].shape[1],
        Z_START=z_start, E=width, PARTS=plan.parts, PADDED=plan.left.shape[0], SIDE=plan.right.shape[0], GROUPS=groups,
        Z_CODES=z_input.codes, NORM=gain is not None, ROTATED=plan.rotated, TURNED=plan.turned, MIDDLE=middle.quantized,
        MIDDLE_ROUNDING=middle.rounding, QUANTIZED=site.quantized, ROUNDING=site.rounding,
        EXACT=plan.left.dtype == torch.float32, num_warps=ROTATE_WARPS,
    )  # fmt: skip
