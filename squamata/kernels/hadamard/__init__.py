"""Orthonormal Hadamard rotation of the last axis, landing on a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.hadamard.matrices import Family, base_matrix, decompose
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@dataclass(frozen=True)
class Rotation:
    """Block-diagonal rotation of ``size`` channels in blocks of ``block`` (a block of its own size: full)."""

    size: int
    block: int
    family: Family = "own"

    @property
    def parts(self) -> tuple[int, int]:
        """(m, 2^k): a block is rotated by H_m (x) H_{2^k}."""
        parts = decompose(self.block, self.family)
        assert parts is not None
        return parts

    @property
    def base(self) -> Tensor:
        """H_m, float32 (m, m)."""
        return base_matrix(self.parts[0], self.family)

    @classmethod
    def of_size(cls, size: int) -> Rotation:
        """The largest Hadamard rotation of this many channels: full where the order exists, else block-diagonal."""
        block = size
        while decompose(block) is None:
            block = _next_smaller_divisor(size, block)
        return cls(size, block)


def _next_smaller_divisor(size: int, below: int) -> int:
    return next(divisor for divisor in range(below - 1, 0, -1) if size % divisor == 0)


@operation
def hadamard(y: Tensor, rotation: Rotation | None, out: Site) -> Value:  # type: ignore[empty-body]
    """y H^T / sqrt(block) in blocks of the last axis, landed on ``out``; no rotation: only landed.

    H = H_m (x) H_{2^k} (matrices.py): the Sylvester factor by the fast Walsh-Hadamard transform, O(n log n).
    """
