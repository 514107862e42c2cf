"""A few elements of a matrix, by rows: what a dense representation of it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NARROW = 2**15  # columns that 16 bits number


@dataclass(frozen=True)
class SparseRows:
    """Compressed rows. ``pointers``: int32 (N + 1,), where each row begins; ``columns``: int16, or int32 of a matrix
    with more than 32768, rising within a row; ``values``: float16, one an element.
    """

    pointers: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, matrix: Tensor, chosen: Tensor) -> SparseRows:
        """The chosen elements (bool (N, K)) of a matrix (N, K)."""
        pointers = torch.zeros(len(matrix) + 1, dtype=torch.int32, device=matrix.device)
        pointers[1:] = chosen.sum(1).cumsum(0)
        columns = chosen.nonzero()[:, 1].to(column_type(matrix.shape[1]))
        return cls(pointers, columns, matrix[chosen].half())

    def added_to(self, dense: Tensor) -> Tensor:
        """The sum with a dense matrix (N, K), in its place and type."""
        rows = torch.arange(len(dense), device=dense.device).repeat_interleave(self.pointers.diff())
        places = (rows, self.columns.long())
        dense[places] = dense[places] + self.values.to(dense.dtype)
        return dense

    def to(self, device: torch.device | str) -> SparseRows:
        """The same on another device."""
        return SparseRows(self.pointers.to(device), self.columns.to(device), self.values.to(device))

    @property
    def nbytes(self) -> int:
        return self.pointers.nbytes + self.columns.nbytes + self.values.nbytes


def column_type(columns: int) -> torch.dtype:
    """The integers in which the columns of a matrix so wide are numbered."""
    return torch.int16 if columns <= NARROW else torch.int32
