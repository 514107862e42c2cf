"""Round to nearest, at any granularity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from squamata import scales
from squamata.kernels.codec import Grid
from squamata.kernels.packing import pack_int4, pack_kept
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import encode
from squamata.scales.gram import Gram
from squamata.spec.quant import QuantSpec

BLOCK = 2**24  # elements that are float32 at a time


def round_to_nearest(weight: Tensor, spec: QuantSpec, layout: Layout, statistics: Gram | None = None) -> QTensor:
    """The nearest code of every element, with the scale that the spec's strategy finds in the tensor itself.

    The columns of a weight whose spec keeps some are in the order in which they fill the groups.

    Needs the int8 codes and a few float32 copies of ``BLOCK`` elements beside the weight; of a quantile over more
    than a row, copies of the whole.
    """
    if spec.kept_channels:
        parts = zip(columns_apart(weight, spec), (spec.of_rest, spec.of_kept), strict=True)
        return joined(
            [round_to_nearest(part, own, of_columns(layout, part)) for part, own in parts if part.numel()], spec
        )
    found = find_scales(weight, spec, layout)
    scale, second = (None if part is None else Partition(spec.granularity, layout).expand(part) for part in found)
    assert scale is not None
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in _row_blocks(weight.shape):
        part = weight[rows].float()
        element = QTensor(part, _of_rows(scale, rows, len(weight)), spec).element_scale()
        element_second = None
        if second is not None:
            element_second = QTensor(part, _of_rows(second, rows, len(weight)), spec).element_scale()
        codes[rows] = encode(part, Grid.of(element, element_second), spec).data
    return pack(QTensor(codes, scale, spec, second))


def find_scales(weight: Tensor, spec: QuantSpec, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Scale and second number, stored form: a block of rows at a time where no scale serves two rows."""
    partition = Partition(spec.granularity, layout)
    if not partition.row_by_row:
        return _scales_of_all(weight, spec, partition)
    parts = []
    for rows in _row_blocks(weight.shape):
        some = weight[rows]
        parts.append(_scales_of_all(some, spec, Partition(spec.granularity, layout.of_rows(len(some)))))
    seconds = [second for _, second in parts if second is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(seconds) if seconds else None


def _scales_of_all(weight: Tensor, spec: QuantSpec, partition: Partition) -> tuple[Tensor, Tensor | None]:
    statistics = scales.gather_for(partition, spec)
    statistics.update(weight.unsqueeze(0))
    return scales.compute(statistics, spec)


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, BLOCK // max(1, prod(shape[1:])))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _of_rows(part: Tensor, rows: slice, count: int) -> Tensor:
    """Those entries of an expanded scale that belong to these rows; all, if the rows share them."""
    return part[rows] if part.ndim and part.shape[0] == count else part


def columns_apart(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The columns of a weight (N, K) that are not kept, and the last, which are."""
    rest = weight.shape[1] - min(spec.kept_channels, weight.shape[1])
    return weight[:, :rest], weight[:, rest:]


def of_columns(layout: Layout, part: Tensor) -> Layout:
    """The layout of some columns of a weight."""
    return replace(layout, sizes=tuple(part.shape))


def joined(parts: Sequence[QTensor], spec: QuantSpec) -> QTensor:
    """One weight of the columns that are not kept, if any, and of those that are."""
    codes = torch.cat([part.codes() for part in parts], dim=1)
    return pack(QTensor(codes, torch.cat([part.scale for part in parts], dim=1), spec))


def pack(quantized: QTensor) -> QTensor:
    """Two codes a byte where they fit (4 bits or fewer, symmetric, two axes)."""
    spec = quantized.spec
    if spec.bits > 4 or not spec.symmetric or quantized.data.ndim != 2:
        return quantized
    columns = quantized.data.shape[-1]
    kept = min(spec.kept_channels, columns)
    packed = pack_kept(quantized.data, kept) if kept else pack_int4(quantized.data)
    return QTensor(packed, quantized.scale, spec, None, columns)
