"""Counts of every group's values, in one pass, over a range that nobody knows beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COUNTS = 2**23  # counts of all groups together, 64 MiB
FINEST, COARSEST = 4096, 8  # bins on either side of zero, for few groups and for very many
SMALLEST_EXPONENT = -100  # magnitudes below 2^-100 are counted with the zeros
AT_ONCE = 2**22  # elements that are binned at a time


class Histogram:
    """Per group, ``2 half`` bins of one width: bin i holds values in [(i - half) width, (i + 1 - half) width).

    The range ends at the power of two above the largest magnitude seen, and doubles (neighbours merge) when a larger
    one comes. As widths are powers of two, x / width is exact, and so are merged counts: whatever the order of the
    data, the result is that of filling at the last width. int64; memory is independent of the number of values.
    """

    def __init__(self, groups: int) -> None:
        fitting = 2 ** (COUNTS // max(1, 2 * groups)).bit_length() // 2
        self.half = min(FINEST, max(COARSEST, fitting))
        self.counts = torch.zeros(groups, 2 * self.half, dtype=torch.int64)
        self.exponent = torch.full((groups,), SMALLEST_EXPONENT)  # the range is +-2^exponent

    def update(self, parts: Sequence[Tensor], largest: Tensor) -> None:
        """Count the members of every group: ``parts`` as ``Partition.split`` gives them, ``largest`` |x| (groups,), all
        finite.
        """
        needed = torch.where(largest > 0, torch.frexp(largest).exponent.long(), SMALLEST_EXPONENT)
        self._widen(torch.maximum(self.exponent, needed))
        start = 0
        for part in parts:
            rows = slice(start, start + len(part))
            for columns in part.split(max(1, AT_ONCE // len(part)), dim=1):
                self._count(rows, columns.float())
            start = rows.stop

    def _widen(self, exponent: Tensor) -> None:
        rows = (exponent > self.exponent).nonzero()[:, 0]
        if len(rows):
            doublings = (exponent - self.exponent)[rows, None].clamp_max(62)
            merged = ((torch.arange(2 * self.half) - self.half) >> doublings) + self.half
            old = self.counts[rows]
            self.counts[rows] = torch.zeros_like(old).scatter_add_(1, merged, old)
            self.exponent = exponent

    def _count(self, rows: slice, values: Tensor) -> None:
        exponent = self.exponent[rows, None]
        inverse = torch.ldexp(torch.full(exponent.shape, float(self.half)), -exponent)
        bins = torch.floor(values * inverse).long() + self.half
        bins += 2 * self.half * torch.arange(len(values))[:, None]
        counts = torch.bincount(bins.reshape(-1), minlength=len(values) * 2 * self.half)
        self.counts[rows] += counts.reshape(len(values), -1)

    @property
    def width(self) -> Tensor:
        """Width of a bin, float64 (groups,)."""
        return torch.ldexp(torch.full(self.exponent.shape, 1.0 / self.half, dtype=torch.float64), self.exponent)

    def edges(self) -> Tensor:
        """Ends of the bins, float64 (groups, bins + 1)."""
        return (torch.arange(2 * self.half + 1) - self.half) * self.width[:, None]

    def centres(self) -> Tensor:
        """Middles of the bins, float64 (groups, bins)."""
        return (torch.arange(2 * self.half) - self.half + 0.5) * self.width[:, None]

    def magnitudes(self) -> Tensor:
        """Counts of |x|, int64 (groups, half): the negative side folded onto the positive."""
        return self.counts[:, self.half :] + self.counts[:, : self.half].flip(1)
