"""Site: one named edge of the network, and what happens to a tensor that lands on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from squamata.kernels.partition import Layout, Partition, gather
from squamata.kernels.qtensor import QTensor, Value
from squamata.spec.quant import QuantSpec

Mode = Literal["float", "observe", "simulate", "integer"]


@dataclass
class Site:
    """Where a tensor may be represented in few bits; producer and consumer share one.

    ``mode`` decides what landing does: *float*: identity; *observe*: identity, and ``observer`` sees the tensor;
    *simulate*: rounded, integers carried in float (differentiable: straight-through); *integer*: rounded to int8.
    Without a spec every mode but *observe* is the identity. ``scale``: stored form (``partition.shape()``), float32.
    """

    name: str
    layout: Layout
    spec: QuantSpec | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    index: Tensor | None = None
    mode: Mode = "float"
    observer: Callable[[Tensor], None] | None = None
    _expanded: tuple[Tensor, Tensor, Tensor | None] | None = field(default=None, repr=False)

    @property
    def partition(self) -> Partition:
        assert self.spec is not None
        return Partition(self.spec.granularity, self.layout, self.index)

    @property
    def quantized(self) -> bool:
        """True if a tensor that lands here leaves as a QTensor."""
        return self.spec is not None and self.mode in ("simulate", "integer")

    @property
    def static(self) -> bool:
        """True if a tensor that lands here becomes int8 with a scale known beforehand: what kernels may fuse."""
        return self.quantized and self.mode == "integer" and not self.spec.dynamic and self.spec.symmetric  # type: ignore[union-attr]

    def set_scale(self, scale: Tensor, zero: Tensor | None = None) -> None:
        """Give the site its calibrated scale, stored form."""
        self.scale, self.zero, self._expanded = scale, zero, None

    def expanded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale, its reciprocal (float32 1/scale: what every backend multiplies with) and zero, broadcastable."""
        if self._expanded is None:
            if self.scale is None:
                raise ValueError(f"{self.name} has no scale: calibrate first")
            scale = self.partition.expand(self.scale.float()).contiguous()
            zero = None if self.zero is None else self.partition.expand(self.zero.float())
            self._expanded = (scale, 1.0 / scale, zero)
        return self._expanded

    def land(self, x: Tensor) -> Value:
        """What the tensor (..., features) becomes here."""
        if self.mode == "observe" and self.observer is not None:
            self.observer(x)
        if not self.quantized:
            return x
        assert self.spec is not None
        scale, inverse, zero = self.runtime_scale(x) if self.spec.dynamic else self.expanded()
        return encode(x, scale, inverse, zero, self.spec, carry_float=self.mode == "simulate")

    def runtime_scale(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale taken from the tensor itself: per token, or over the whole tensor in the site's granularity."""
        assert self.spec is not None
        if "token" in self.spec.granularity.axes:
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        else:
            parts = self.partition.split(x)
            shape = self.partition.shape()
            low = self.partition.expand(gather([part.amin(-1) for part in parts], shape))
            high = self.partition.expand(gather([part.amax(-1) for part in parts], shape))
        scale, zero = range_to_scale(low, high, self.spec)
        return scale, 1.0 / scale, zero

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Value:
        """Zeros of this shape in the site's own storage: how caches are made."""
        if not self.quantized:
            return torch.zeros(shape, dtype=dtype)
        assert self.spec is not None
        carrier = torch.zeros(shape, dtype=torch.int8 if self.mode == "integer" else torch.float32)
        if self.spec.dynamic:
            scale = torch.ones_like(self.runtime_scale(carrier.float())[0])
            return QTensor(carrier, scale, self.spec, None if self.spec.symmetric else torch.zeros_like(scale))
        scale, _, zero = self.expanded()
        if zero is not None:
            carrier += zero.to(carrier.dtype)
        return QTensor(carrier, scale, self.spec, zero)


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


def encode(
    x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor | None, spec: QuantSpec, carry_float: bool = False
) -> QTensor:
    """Round to the grid: code = clamp(round(x * inverse) + zero). The definition every kernel must agree with."""
    scaled = x.float() * inverse
    rounded = round_codes(scaled, spec.rounding)
    if carry_float:
        rounded = scaled + (rounded - scaled).detach()
    if zero is not None:
        rounded = rounded + zero
    codes = rounded.clamp(*spec.code_range)
    return QTensor(codes if carry_float else codes.to(torch.int8), scale, spec, zero)


def round_codes(x: Tensor, rounding: str) -> Tensor:
    """Round to integers: ties to even, ties away from zero, or towards zero."""
    if rounding == "half-even":
        return torch.round(x)
    if rounding == "half-away":
        return torch.copysign(torch.floor(x.abs() + 0.5), x)
    return torch.trunc(x)
