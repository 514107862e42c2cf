"""The second level of scales: groups relative to a scale of their row (QQQ, arXiv 2406.09904; Quamba's W4A8)."""

from __future__ import annotations

import torch

from squamata.kernels.qtensor import QTensor
from squamata.spec.quant import QuantSpec

SMALLEST = 1e-8  # a channel scale


def with_second_level(weight: QTensor, spec: QuantSpec) -> QTensor:
    """A grouped weight (N, K) whose group scales become ratios to max |row| / 127, as precise as they are stored."""
    largest = weight.dequantize().abs().amax(-1, keepdim=True)
    channel = (largest / 127).clamp_min(SMALLEST)
    ratio = (weight.scale / channel).to(getattr(torch, spec.scale_dtype)).float()
    return QTensor(weight.data, ratio, spec, channel, weight.length)
