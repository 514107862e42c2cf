"""Linear projection of float or integer activations by float or integer weights, landing on one site a segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import QTensor, Value
from squamata.kernels.site import Site


@dataclass
class Linear:
    """A weight (out, in), its bias (out,), and how many output rows go to each site.

    ``sixteen_bits``: a backend may take float activations as 16-bit integers with a scale a row or a part of it, off by
    1.5e-5 of the largest value there. Only where nothing in the model is rounded to few bits afterwards: such codes
    would differ from the reference's more often than once in 1e5.
    ``packed``: what a backend made of the weight for its own use; never saved.
    """

    weight: Value
    bias: Tensor | None = None
    segments: tuple[int, ...] = ()
    sixteen_bits: bool = False
    packed: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> tuple[int, ...]:
        return self.segments or (self.weight.shape[0],)


@operation
def linear(x: Value, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:  # type: ignore[empty-body]
    """y = x W^T + bias, split along the rows in ``layer.rows``, segment i landed on ``out[i]`` (None: left float).

    ``x``: (..., in). Integers meet integers exactly: accumulators are exact, then
    y = float32(accumulator) * (scale_x * scale_w) + bias, groups of a grouped weight added in increasing order as
    float32(accumulator_g) * scale_w[g] before scale_x; if x has the same groups, as
    float32(accumulator_g) * (scale_x[g] * scale_w[g]). Channels of ``x`` that are kept in float are a float product of
    their own with the dequantized weight, added before the bias. Anything else is dequantized first (but see
    ``sixteen_bits``).
    """


def integer_product(x: Value, weight: Value) -> bool:
    """True if the codes of both operands can enter a product, so that it accumulates integers."""
    return all(isinstance(value, QTensor) and value.spec.integer_grid for value in (x, weight))
