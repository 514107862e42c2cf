# mypy: allow-untyped-defs
"""One token through the causal convolution: what the product that makes its newest input does with its rows."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.math import silu, to_codes


@dataclass(frozen=True)
class ConvolutionPlan:
    """Depthwise convolution over C channels that read a ring of inputs, and the sites of its outputs.

    ``taps``: float32 (K, C), integers if the inputs are codes. All float32 (C,): ``factor`` (scale of input times
    weight), ``bias``, ``inverse`` (0: the output stays float), ``scale``, ``low``, ``high``. Roundings of u, and of
    B and C: -1 where all stay float. ``all_codes``: every output has a grid; ``uniform``: B's channels share one
    scale, and so do C's. ``split``: channels of u, which come first.
    """

    taps: Tensor
    factor: Tensor
    bias: Tensor
    inverse: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    rounding: int
    rounding_bc: int = -1
    all_codes: bool = False
    uniform: bool = False
    split: int = 0

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """As the kernels take it."""
        return self.taps, self.factor, self.bias, self.inverse, self.scale, self.low, self.high


@triton.jit
def conv_history(tables, ring, channel, mask, now, row, rows, C, WIDTH: tl.constexpr):
    """Sum of taps times past inputs of some channels: nothing here waits for this token."""
    taps = tables[0]
    total = tl.zeros(channel.shape, tl.float32)
    for k in tl.static_range(WIDTH - 1):
        slot = (now + 1 + k) % WIDTH
        x = tl.load(ring + (slot * rows + row) * C + channel, mask=mask, other=0).to(tl.float32)
        total += x * tl.load(taps + k * C + channel, mask=mask, other=0.0)
    return total


@triton.jit
def conv_tables(tables, channel, mask, C, WIDTH: tl.constexpr):
    """Newest tap, factor, bias and grid of some channels."""
    taps, factor, bias, inverse, scale, low, high = tables
    return (
        tl.load(taps + (WIDTH - 1) * C + channel, mask=mask, other=0.0),
        tl.load(factor + channel, mask=mask, other=0.0), tl.load(bias + channel, mask=mask, other=0.0),
        tl.load(inverse + channel, mask=mask, other=0.0), tl.load(scale + channel, mask=mask, other=0.0),
        tl.load(low + channel, mask=mask, other=0.0), tl.load(high + channel, mask=mask, other=0.0),
    )  # fmt: skip


@triton.jit
def convolve(total, newest, loaded, channel, SPLIT: tl.constexpr, ROUNDING: tl.constexpr, ROUNDING_BC: tl.constexpr,
             CODES: tl.constexpr):  # fmt: skip
    """SiLU(sum_k x[t - K + 1 + k] tap[k] * factor + bias), landed; CODES: not dequantized."""
    tap, factor, bias, inverse, scale, low, high = loaded
    u = silu((total + newest * tap) * factor + bias)
    if ROUNDING >= 0 or ROUNDING_BC >= 0:
        landed = to_codes(u, inverse, low, high, ROUNDING if ROUNDING >= 0 else ROUNDING_BC)
        if ROUNDING_BC >= 0 and ROUNDING_BC != ROUNDING:
            landed = tl.where(channel < SPLIT, landed, to_codes(u, inverse, low, high, ROUNDING_BC))
        u = tl.where(inverse == 0, u, landed if CODES else landed * scale)
    return u
