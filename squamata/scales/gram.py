"""Second moments of what a weight multiplies: all that layer-wise weight quantizers need to know of their data."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.scales.statistics import NOT_FINITE


class Gram:
    """``gram`` = sum of x x^T over ``count`` tokens, float64 (K, K), of the K inputs of a product.

    Half the Hessian of ||W x - W' x||^2 with respect to a row of W' (GPTQ, arXiv 2210.17323, section 3).
    Memory: 8 K^2 bytes, whatever the number of tokens.
    """

    def __init__(self, features: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Take in a tensor (..., K) of any float type; SquamataError if a value or its square is not finite."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.gram += _second_moments(rows)
        self.count += len(rows)
        if not bool(torch.isfinite(self.gram.diagonal()).all()):
            raise SquamataError(NOT_FINITE)

    def ordered(self, order: Tensor) -> Gram:
        """Of the same inputs in another order, int64 (K,)."""
        other = Gram(0)
        other.gram, other.count = self.gram[order][:, order], self.count
        return other


def _second_moments(rows: Tensor) -> Tensor:
    if not rows.is_cuda:
        return rows.T @ rows
    from squamata.kernels.gpu.pairs import POSSIBLE, second_moments  # needs triton

    return second_moments(rows) if POSSIBLE else rows.T @ rows
