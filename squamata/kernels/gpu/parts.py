# mypy: allow-untyped-defs
"""FalconMamba's RMS norms of dt_low, B and C, which have no weights, between x_proj and what reads its rows."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.gemm import permuted
from squamata.kernels.gpu.gemv import Landing
from squamata.kernels.gpu.math import to_codes


@dataclass(frozen=True)
class PartNorms:
    """``sizes``: rows of dt_low, B and C. ``landing``: of all of them, after the norm."""

    epsilon: float
    sizes: tuple[int, int, int]
    landing: Landing


@triton.jit
def _norm_parts_kernel(x, inverse, scale, low, high, first, rest, epsilon, first_stride, rest_stride, R, N,
                       SPLIT: tl.constexpr, FORMAT: tl.constexpr, ANY_CODES: tl.constexpr, ROUNDING: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """One part of one row. ``SPLIT``: dt_low goes to ``first``, in the order of FORMAT, and the values of the rest to
    ``rest``; else codes go to ``first`` and what stays float to ``rest``.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = tl.where(part == 0, R, N)
    column = tl.where(part == 0, 0, R + (part - 1) * N) + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < size
    value = tl.load(x + row * (R + 2 * N) + column, mask=mask, other=0.0)
    value = value * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=0) / size + epsilon))
    code, coded, plain = value, mask & (column < 0), mask
    if ANY_CODES:
        inverse_ = tl.load(inverse + column, mask=mask, other=0.0)
        bounds = (tl.load(low + column, mask=mask, other=0.0), tl.load(high + column, mask=mask, other=0.0))
        code = to_codes(value, inverse_, bounds[0], bounds[1], ROUNDING)
        coded, plain = mask & (inverse_ != 0), mask & (inverse_ == 0)
    if SPLIT:
        value = tl.where(coded, code * tl.load(scale + column, mask=mask, other=0.0), value) if ANY_CODES else value
        kept = code if first.dtype.element_ty == tl.int8 else value
        place = row * first_stride + permuted(column, FORMAT)
        tl.store(first + place, kept.to(first.dtype.element_ty), mask=mask & (column < R))
        tl.store(rest + row * rest_stride + column - R, value.to(rest.dtype.element_ty), mask=mask & (column >= R))
    else:
        tl.store(first + row * first_stride + column, code.to(first.dtype.element_ty), mask=coded)
        tl.store(rest + row * rest_stride + column, value.to(rest.dtype.element_ty), mask=plain)


def norm_parts(x: Tensor, norms: PartNorms, codes: Tensor | None, values: Tensor | None) -> None:
    """x float32 (rows, R + 2 N), every part over its RMS, landed on ``codes`` int8 and ``values`` of the same shape,
    each None if nothing goes there."""
    first, rest = codes if codes is not None else values, values if values is not None else codes
    assert first is not None and rest is not None
    _launch(x, norms, first, rest, split=False, format=0)


def norm_parts_apart(x: Tensor, norms: PartNorms, dt_low: Tensor, rest: Tensor, format: int) -> None:
    """The same, as a prefill reads them: dt_low (rows, R), codes if it is int8, in the column order of ``format``;
    values of B and C (rows, 2 N)."""
    _launch(x, norms, dt_low, rest, split=True, format=format)


def _launch(x: Tensor, norms: PartNorms, first: Tensor, rest: Tensor, split: bool, format: int) -> None:
    landing, sizes = norms.landing, norms.sizes
    assert landing.scale is not None
    _norm_parts_kernel[(len(x), len(sizes))](
        x, landing.inverse, landing.scale, landing.low, landing.high, first, rest, norms.epsilon, first.stride(0),
        rest.stride(0), sizes[0], sizes[1], SPLIT=split, FORMAT=format, ANY_CODES=landing.any_codes,
        ROUNDING=landing.rounding, BLOCK=triton.next_power_of_2(max(sizes)), num_warps=1,
    )  # fmt: skip
