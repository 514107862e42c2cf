"""Depthwise causal convolution and SiLU over a few input sites, with the last inputs kept as state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site


@operation
def causal_conv1d(  # type: ignore[empty-body]
    inputs: Sequence[Value], weight: Value, bias: Tensor | None, state: Value, out: Sequence[Site]
) -> tuple[Value, ...]:
    """u[t, c] = SiLU(sum_k x[t - K + 1 + k, c] weight[c, k] + bias[c]), landed; ``state`` is updated in place.

    ``inputs``: (B, L, C_i) each, side by side C = sum C_i; ``weight``: (C, K); ``state``: (B, C, K - 1), the inputs
    before the first, int8 codes of the input sites when all of them are int8. Integers meet integers exactly:
    float32(accumulator) * (scale_x * scale_w) + bias.
    """


def empty_state(batch: int, width: int, sites: Sequence[Site], dtype: torch.dtype) -> Value:
    """Zeroed history (B, C, K - 1) for inputs that land on ``sites``: codes if all have static, symmetric scales and
    a linear grid.
    """
    sizes = [site.layout.flat_size for site in sites]
    specs = [site.spec for site in sites if site.quantized and site.spec is not None]
    if len(specs) < len(sites) or any(spec.dynamic or not (spec.symmetric and spec.linear_grid) for spec in specs):
        return torch.zeros(batch, sum(sizes), width - 1, dtype=dtype)
    carrier = torch.int8 if sites[0].mode == "integer" else torch.float32
    scale = torch.cat([site.expanded()[0].expand(size) for site, size in zip(sites, sizes, strict=True)])
    return QTensor(torch.zeros(batch, sum(sizes), width - 1, dtype=carrier), scale[:, None], specs[0])


def factored(weight: Value, state: QTensor) -> tuple[Tensor, Tensor]:
    """Taps (C, K) that meet the codes of ``state``, and the scale of their sum, (C, 1) or one number.

    The taps are codes themselves if one scale serves all taps of a channel, else dequantized.
    """
    if isinstance(weight, QTensor) and weight.spec.linear_grid and weight.element_scale().shape[-1:] in ((), (1,)):
        return weight.codes(), state.scale * weight.element_scale()
    return as_float(weight), state.scale
