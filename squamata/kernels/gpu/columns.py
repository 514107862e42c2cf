# mypy: allow-untyped-defs
"""GPTQ's inner loop in one kernel: round a column, subtract what its error does to those of its block that follow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.math import ROUNDINGS, to_codes
from squamata.spec.quant import QuantSpec

MOST_COLUMNS = 128  # of a block: they stay in registers
ROWS, WARPS = 16, 2  # rows of the weight that a program takes


@triton.jit
def _round_kernel(columns, factor, scale, zero, codes, errors, rows, count, scale_column, scale_row, low, high,
                  ZERO: tl.constexpr, ROUNDING: tl.constexpr, COLUMNS: tl.constexpr,
                  ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = row < rows
    block = (column[:, None] < count) & mask[None, :]
    work = tl.load(columns + column[:, None] * rows + row[None, :], mask=block, other=0.0)
    for i in range(count):
        value = tl.sum(tl.where(column[:, None] == i, work, 0.0), axis=0)
        step = tl.load(scale + i * scale_column + row * scale_row, mask=mask, other=1.0)
        point = tl.zeros_like(step)
        if ZERO:
            point = tl.load(zero + i * scale_column + row * scale_row, mask=mask, other=0.0)
        code = to_codes(value, tl.div_rn(1.0, step), low - point, high - point, ROUNDING)
        error = tl.div_rn(value - code * step, tl.load(factor + i * (count + 1)))
        later = (column > i) & (column < count)
        slope = tl.load(factor + i * count + column, mask=later, other=0.0)
        work -= slope[:, None] * error[None, :]
        tl.store(codes + i * rows + row, (code + point).to(tl.int8), mask=mask)
        tl.store(errors + i * rows + row, error, mask=mask)


def round_columns(
    columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Codes int8 and errors float32, (C, N), of a block of at most 128 columns (C, N), which stays as it is.

    In turn: code = encode(column), error = (column - its value) / factor[i, i], and factor[i, j] error off every later
    column j. ``factor``: float32 upper triangle (C, C). ``scale``, ``zero``: of every element (C, N), with the same
    strides, for a spec with a linear grid.
    """
    count, rows = columns.shape
    assert count <= MOST_COLUMNS and columns.is_contiguous() and spec.linear_grid
    codes = torch.empty(count, rows, dtype=torch.int8, device=columns.device)
    errors = torch.empty_like(columns)
    low, high = (float(bound) for bound in spec.code_range)
    _round_kernel[(triton.cdiv(rows, ROWS),)](
        columns, factor.contiguous(), scale, scale if zero is None else zero, codes, errors, rows, count,
        *scale.stride(), low, high, ZERO=zero is not None, ROUNDING=ROUNDINGS[spec.rounding],
        COLUMNS=triton.next_power_of_2(count), ROWS=ROWS, num_warps=WARPS,
        enable_fp_fusion=False,  # as the reference rounds: product, then difference
    )  # fmt: skip
    return codes, errors
