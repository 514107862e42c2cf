"""Reference: exact integer accumulation in whichever floating type holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul_transposed

from squamata.kernels.linear import Linear, integer_product
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site

FLOAT32_EXACT = 2**24  # every integer up to here has a float32


def run(x: Value, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:
    y = product(x, layer.weight)
    if layer.bias is not None:
        y = y + layer.bias
    parts = y.split(layer.rows, dim=-1)
    return tuple(part if site is None else site.land(part) for part, site in zip(parts, out, strict=True))


def product(x: Value, weight: Value) -> Tensor:
    """x W^T without bias, in float32 (or the operands' own floating type)."""
    if not integer_product(x, weight):
        dtype = x.dtype if isinstance(x, Tensor) else torch.float32
        return matmul_transposed(as_float(x, dtype), as_float(weight, dtype).to(dtype))
    assert isinstance(x, QTensor) and isinstance(weight, QTensor)
    y = integer_sums(x, weight)
    return y if x.kept is None else y + matmul_transposed(x.kept, weight.dequantize())


def integer_sums(x: QTensor, weight: QTensor) -> Tensor:
    """The codes' part of x W^T, float32."""
    if weight.spec.granularity.group is None:
        accumulator = accumulate(x.codes(), weight.codes(), x, weight)
        return accumulator * (x.scale * (weight.scale if weight.scale.ndim == 0 else weight.scale.reshape(-1)))
    alike = x.spec.granularity.group is not None  # and then the recipe's checker has seen that the groups are the same
    sizes = weight.spec.group_sizes(weight.shape[-1])
    ordered = weight.spec.kept_channels > 0
    pieces = ((value.codes_in_order() if ordered else value.codes()).split(sizes, dim=-1) for value in (x, weight))
    total: Tensor | None = None
    for number, (x_group, weight_group) in enumerate(zip(*pieces, strict=True)):
        scale = weight.scale[:, number]
        term = accumulate(x_group, weight_group, x, weight) * (x.scale[..., number, None] * scale if alike else scale)
        total = term if total is None else total + term
    assert total is not None
    return total if alike else total * x.scale


def accumulate(x_codes: Tensor, weight_codes: Tensor, x: QTensor, weight: QTensor) -> Tensor:
    """Exact integer dot products as float32 (rounded once if beyond 2^24)."""
    largest = 2 ** (x.spec.widest - x.spec.symmetric) * 2 ** (weight.spec.widest - weight.spec.symmetric)
    exact = torch.float32 if x_codes.shape[-1] * largest <= FLOAT32_EXACT else torch.float64
    return matmul_transposed(x_codes.to(exact), weight_codes.to(exact)).float()
