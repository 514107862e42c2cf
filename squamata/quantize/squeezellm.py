"""SqueezeLLM: a table of values for every row, where the loss bends most, and a sparse rest (arXiv 2306.07629)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.clusters import row_centres
from squamata.kernels.grid import Grid
from squamata.kernels.packing import pack_stream
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import encode
from squamata.kernels.sparse import SparseRows
from squamata.quantize.rtn import round_to_nearest
from squamata.spec.quant import QuantSpec

HALVINGS = 60  # of the interval in which the fences' reach is sought

Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class Sensitivity:
    """What must be known of a weight (N, K) beforehand. ``squares``: mean squared gradients of the loss, (N, K); None
    where all elements count alike. ``fence``: the magnitude above which an element is an outlier.
    """

    squares: Tensor | None
    fence: float


def squeezellm(
    weight: Tensor,
    spec: QuantSpec,
    layout: Layout,
    statistics: Sensitivity | None,
    sensitive: Share = 0.1,
    fisher: bool = True,
) -> QTensor:
    """2^bits values a row that minimise sum_k F_k (w_k - value)^2, F the mean squared gradient (section 4.1).

    First ``spec.sparse`` of the elements go to the sparse part (section 4.2): the share ``sensitive`` of these are the
    weight's elements of largest F, the others those outside the fence. They take no part in the k-means; there the
    dense part says what is nearest to 0, and the sparse part the difference. ``fisher`` off: F = 1, outliers alone. A
    spec without table is rounded to nearest. k-means is solved exactly (``kernels.clusters``); codes are the nearest
    values of the table as it is stored. Deterministic. Memory: some ten float32 copies of the weight. SquamataError
    without statistics.
    """
    if not spec.tabulated:
        return round_to_nearest(weight, spec, layout)
    if statistics is None:
        raise SquamataError("squeezellm must see the whole model first: give a text with --calibration FILE")
    values = weight.float()
    apart = _apart(values, spec, statistics, sensitive)
    counted = torch.ones_like(values) if statistics.squares is None else statistics.squares.float()
    found = row_centres(values.cpu().numpy(), counted.masked_fill(apart, torch.nan).cpu().numpy(), spec.numbers)
    table = torch.from_numpy(found).to(weight.device, getattr(torch, spec.scale_dtype)).float()
    dense = encode(values.masked_fill(apart, 0.0), Grid.of(table), spec)
    sparse = SparseRows.of(values - dense.dequantize(), apart) if spec.sparse else None
    return QTensor(pack_stream(dense.data, spec.bits), table, spec, None, weight.shape[1], sparse)


def _apart(values: Tensor, spec: QuantSpec, statistics: Sensitivity, sensitive: float) -> Tensor:
    """Which elements the sparse part takes: bool (N, K)."""
    if not spec.sparse:
        return torch.zeros_like(values, dtype=torch.bool)
    apart = values.abs() > statistics.fence
    if statistics.squares is not None:
        largest = statistics.squares.flatten().topk(round(sensitive * spec.sparse * values.numel())).indices
        apart.view(-1)[largest] = True
    return apart


def sensitivities(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    squares: Mapping[str, Tensor] | None,
    sensitive: Share = 0.1,
    fisher: bool = True,
) -> dict[str, Sensitivity]:
    """What ``squeezellm`` must know of the weights of a model that share their outliers' budget, by name.

    An outlier lies more than r interquartile ranges outside the quartiles of its weight; r is the same everywhere, such
    that the specs' sparse shares, less what the sensitive elements take, are outside in all.
    """
    share = 1.0 - sensitive if squares is not None else 1.0
    boxes = {name: _box(weight) for name, weight in weights.items() if specs[name].sparse}
    wanted = sum(share * specs[name].sparse * weights[name].numel() for name in boxes)

    def outside(reach: float) -> int:
        return sum(int((weights[name].abs() > _fence(box, reach)).sum()) for name, box in boxes.items())

    low, high = 0.0, max((_farthest(weights[name], box) for name, box in boxes.items()), default=0.0)
    for _ in range(HALVINGS if boxes else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle) > wanted else (low, middle)
    return {
        name: Sensitivity(squares[name] if squares is not None else None, _fence(boxes.get(name, (0.0, 1.0)), high))
        for name in weights
    }


def _box(weight: Tensor) -> tuple[float, float]:
    """The farther of the two quartiles from 0 (the first counting downwards), and their distance."""
    flat = weight.flatten().float()
    first, third = (float(flat.kthvalue(1 + round(share * (len(flat) - 1))).values) for share in (0.25, 0.75))
    return max(-first, third), max(third - first, torch.finfo(torch.float32).tiny)


def _fence(box: tuple[float, float], reach: float) -> float:
    """max(|q1 - r (q3 - q1)|, |q3 + r (q3 - q1)|), for quartiles on both sides of 0."""
    return box[0] + reach * box[1]


def _farthest(weight: Tensor, box: tuple[float, float]) -> float:
    """The reach that no element exceeds."""
    return max(0.0, (float(weight.abs().max()) - box[0]) / box[1])
