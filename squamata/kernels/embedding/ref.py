"""Reference."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.qtensor import QTensor, Value


def run(ids: Tensor, weight: Value, dtype: torch.dtype) -> Tensor:
    ids = ids.long() if ids.device.type != "cpu" else _checked(ids, weight.shape[0])
    if not isinstance(weight, QTensor):
        return weight[ids].to(dtype)
    per_row = weight.scale.ndim > 0
    scale = weight.scale[ids.reshape(-1)] if per_row else weight.scale
    second = weight.second if weight.second is None or not per_row else weight.second[ids.reshape(-1)]
    rows = QTensor(weight.data[ids.reshape(-1)], scale, weight.spec, second, weight.length)
    return rows.dequantize(dtype).reshape(*ids.shape, weight.shape[1])


def _checked(ids: Tensor, vocabulary: int) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise SquamataError(f"token ids must be whole numbers (int64), not {ids.dtype}")
    ids = ids.long()
    if ids.numel():
        smallest, largest = (int(id_) for id_ in ids.aminmax())
        if smallest < 0 or largest >= vocabulary:
            outside = smallest if smallest < 0 else largest
            raise SquamataError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")
    return ids
