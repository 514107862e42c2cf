"""Reference."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.qtensor import QTensor, Value


def run(ids: Tensor, weight: Value, dtype: torch.dtype) -> Tensor:
    if not isinstance(weight, QTensor):
        return weight[ids].to(dtype)
    per_row = weight.scale.ndim > 0
    scale = weight.scale[ids.reshape(-1)] if per_row else weight.scale
    second = weight.second if weight.second is None or not per_row else weight.second[ids.reshape(-1)]
    rows = QTensor(weight.data[ids.reshape(-1)], scale, weight.spec, second, weight.length)
    return rows.dequantize(dtype).reshape(*ids.shape, -1)
