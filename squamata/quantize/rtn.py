"""Round to nearest, at any granularity."""

from __future__ import annotations

from torch import Tensor

from squamata import scales
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import encode
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec


def round_to_nearest(weight: Tensor, spec: QuantSpec, layout: Layout) -> QTensor:
    """The nearest code of every element, with the scale that the spec's strategy finds in the tensor itself."""
    weight = weight.float()
    partition = Partition(spec.granularity, layout)
    statistics = Statistics(partition, spec)
    statistics.update(weight.unsqueeze(0))
    scale, zero = (None if part is None else partition.expand(part) for part in scales.compute(statistics, spec))
    assert scale is not None
    shaped = QTensor(weight, scale, spec, zero)
    element = shaped.element_scale()
    element_zero = None if zero is None else QTensor(weight, zero, spec).element_scale()
    codes = encode(weight, element, 1.0 / element, element_zero, spec).data
    return pack(QTensor(codes, scale, spec, zero))


def pack(quantized: QTensor) -> QTensor:
    """Two codes a byte where they fit (4 bits or fewer, symmetric, two axes)."""
    spec = quantized.spec
    if spec.bits > 4 or not spec.symmetric or quantized.data.ndim != 2:
        return quantized
    return QTensor(pack_int4(quantized.data), quantized.scale, spec, None, quantized.data.shape[-1])
