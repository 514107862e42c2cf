# mypy: allow-untyped-defs
"""Landing a row on the site of what reads it: int8 with one scale or the row's own, or 16 bits in two int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.math import to_codes

SMALLEST_SCALE = tl.constexpr(1e-8)  # of a dynamic site, as in site.range_to_scale
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
def land_row(y, out, out_scale, row, offsets, mask, inverse, low, high, span, QUANTIZED: tl.constexpr,
             DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip
    if QUANTIZED:
        if DYNAMIC:
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(y), axis=0), span), SMALLEST_SCALE)
            tl.store(out_scale + row, scale)
            inverse = tl.div_rn(1.0, scale)
        tl.store(out + offsets, to_codes(y, inverse, low, high, ROUNDING).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + offsets, y, mask=mask)


@triton.jit
def land_halves(y, largest, out, out_scale, row, offsets, mask, WIDTH):
    """y in 16 bits, its row's own scale: the upper halves first, the lower WIDTH bytes on.

    The scale that is stored knows that 4-bit codes sit in the upper half of a byte (``gpu.tiles``).
    """
    scale = tl.maximum(largest / _SPAN_16, SMALLEST_SCALE)
    tl.store(out_scale + row, scale * 0.0625)
    code = to_codes(y, 1.0 / scale, -_SPAN_16, _SPAN_16, 0)
    upper = tl.floor((code + 128.0) * 0.00390625)
    tl.store(out + offsets, upper.to(tl.int8), mask=mask)
    tl.store(out + WIDTH + offsets, (code - 256.0 * upper).to(tl.int8), mask=mask)


@triton.jit
def land_block(y, scale, out, row, at, channel, live, E: tl.constexpr, CHANNELS: tl.constexpr):
    """Leave y, the channels of block ``at`` of CHANNELS, in 16 bits with a scale of its own (rows, E / CHANNELS)."""
    largest = tl.max(tl.where(live, tl.abs(y), 0.0), axis=0)
    land_halves(y, largest, out, scale, row * (E // CHANNELS) + at, row * (2 * E) + channel, live, E)
