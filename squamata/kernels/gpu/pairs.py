# mypy: allow-untyped-defs
"""Products of float32 matrices on tensor cores: every number as two float16, of which the second is what the first
leaves over (22 bits together, float32 has 24), rows scaled by powers of two so that nothing overflows.

Three float16 products (high x high, high x low, low x high) as one of three times the width: what is left out is 2^-22
of the largest. On an H200 several times as fast as float32 products (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

POSSIBLE = "dtype" in torch.ops.aten.mm.overloads()  # float16 in, float32 out: torch 2.8
HIGH_LOW, HIGH_LOW_HIGH, HIGH_HIGH_LOW = 0, 1, 2  # what lies side by side
FINISHED = 1024  # numbers of a row that a program scales back


@dataclass(frozen=True)
class Pairs:
    """``parts``: float16 (M, 2 K or 3 K). A number is (high + low) times its row's ``factor``, float32 (M,) or (1,)."""

    parts: Tensor
    factor: Tensor


@triton.jit
def _split_kernel(x, largest, out, factor, K, stride, SHARED: tl.constexpr, LAYOUT: tl.constexpr,
                  BK: tl.constexpr):  # fmt: skip
    """One row: the largest magnitude is brought to 2^14 .. 2^15."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BK)
    mask = column < K
    value = tl.load(x + row * stride + column, mask=mask, other=0.0)
    most = tl.load(largest) if SHARED else tl.max(tl.abs(value), axis=0)
    exponent = tl.maximum((most.to(tl.int32, bitcast=True) >> 23) & 255, 15)
    value = value * ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    high = value.to(tl.float16)
    low = (value - high.to(tl.float32)).to(tl.float16)
    start = out + row * (2 * K if LAYOUT == 0 else 3 * K) + column
    tl.store(start, high, mask=mask)
    tl.store(start + K, high if LAYOUT == 2 else low, mask=mask)
    if LAYOUT > 0:
        tl.store(start + 2 * K, low if LAYOUT == 2 else high, mask=mask)
    tl.store(factor + (0 if SHARED else row), ((exponent - 14) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _finish_kernel(y, row_factor, column_factor, bias, N, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    value = tl.load(y + row * N + column, mask=mask)
    value = value * tl.load(column_factor + column, mask=mask) * tl.load(row_factor + row)
    if BIAS:
        value += tl.load(bias + column, mask=mask)
    tl.store(y + row * N + column, value, mask=mask)


def split_rows(x: Tensor, layout: int, shared: bool = False) -> Pairs:
    """Rows (M, K) float32 as pairs; ``shared``: all rows with one factor."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    parts = torch.empty(rows, width * (2 if layout == HIGH_LOW else 3), dtype=torch.float16, device=x.device)
    factor = torch.empty(1 if shared else rows, device=x.device)
    largest = torch.linalg.vector_norm(x, torch.inf) if shared else factor
    _split_kernel[(rows,)](
        x, largest, parts, factor, width, x.stride(0), SHARED=shared, LAYOUT=layout, BK=triton.next_power_of_2(width),
        num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return Pairs(parts, factor)


def product(x: Tensor, weight: Pairs, bias: Tensor | None) -> Tensor:
    """x W^T + bias, float32: x (M, K) float32, ``weight`` split with layout ``HIGH_HIGH_LOW``, bias (N,)."""
    ours = split_rows(x, HIGH_LOW_HIGH)
    y = _multiply(ours.parts, weight.parts.T)
    outputs = y.shape[1]
    _finish_kernel[(len(y), triton.cdiv(outputs, FINISHED))](
        y, ours.factor, weight.factor, weight.factor if bias is None else bias, outputs, BIAS=bias is not None,
        BLOCK=FINISHED,
    )  # fmt: skip
    return y


def second_moments(x: Tensor) -> Tensor:
    """x^T x, float32 (K, K), of x (M, K) float32."""
    width = x.shape[1]
    pairs = split_rows(x, HIGH_LOW, shared=True)
    both = _multiply(pairs.parts[:, :width].T, pairs.parts)
    high, mixed = both[:, :width], both[:, width:]
    return (high + mixed + mixed.T) * pairs.factor.square()


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a b of float16, summed and kept in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
