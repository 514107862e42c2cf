"""Rows of the embedding table, float or quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import Value


@operation
def embedding(ids: Tensor, weight: Value, dtype: torch.dtype) -> Tensor:  # type: ignore[empty-body]
    """Rows ``ids`` (B, L) of ``weight`` (V, D) as (B, L, D) in ``dtype``; only these rows are dequantized.

    SquamataError for ids on the CPU that are not whole numbers from 0 to V - 1. On a GPU nobody looks: that would wait.
    """
