# mypy: allow-untyped-defs
"""The residual stream between layers: the product that ends a layer adds to it and leaves what the next one reads.

RMS norm is one number a row. Whoever changes the stream leaves it multiplied with the next norm's gain, and its sums of
squares, a block of channels each; the number is made of them by the product that begins the next layer, where its
activations are float or 16 bits with a scale a block, else by a kernel that only lands a row on its site.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.landing import land_block


@dataclass(frozen=True)
class Sink:
    """``stream``: float32 (B, D), added to. ``left``: the new stream times ``gain`` (D,), float32 (B, D), or int8
    (B, 2 D) in 16 bits with ``scale`` (B, D / channels). ``squares``: (B, D / channels), before the gain. Float32."""

    channels: int
    stream: Tensor
    gain: Tensor
    left: Tensor
    squares: Tensor
    scale: Tensor | None

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """As kernels take it."""
        scale = self.squares if self.scale is None else self.scale
        return self.stream, self.gain, self.left, self.squares, scale

    @property
    def halves(self) -> bool:
        """True if it is left in 16 bits."""
        return self.scale is not None


@triton.jit
def leave_block(after, gain, sink, row, at, channel, live, D: tl.constexpr, CHANNELS: tl.constexpr,
                HALVES: tl.constexpr):  # fmt: skip
    """Leave the new stream of the channels of block ``at``."""
    stream, _, left, squares, scale = sink
    tl.store(stream + row * D + channel, after, mask=live)
    tl.store(squares + row * (D // CHANNELS) + at, tl.sum(tl.where(live, after * after, 0.0), axis=0))
    if HALVES:
        land_block(after * gain, scale, left, row, at, channel, live, D, CHANNELS)
    else:
        tl.store(left + row * D + channel, after * gain, mask=live)
