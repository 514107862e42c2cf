"""A bounded sample of every group's values: all of them while they are few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VALUES = 2**24  # values of all groups together, 64 MiB
LARGEST = 2**16  # values of a group


class Sample:
    """Reservoirs: a uniform sample without replacement of what was seen, float32, seeded.

    Every observation draws a random key, and those with the smallest keys stay. Groups of one part share their keys
    (an observation is kept for all of them). Depends on the order of the data once not ``complete``.
    """

    def __init__(self, groups: int, seed: int = 0) -> None:
        self.size = max(1, min(LARGEST, VALUES // max(1, groups)))
        self.values: list[Tensor] = []  # a part: (groups of the part, values)
        self._keys: list[Tensor] = []
        self._seen: list[int] = []
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, parts: Sequence[Tensor]) -> None:
        """Take in the members of every group, as ``Partition.split`` gives them."""
        if not self.values:
            self.values = [torch.empty(len(part), 0) for part in parts]
            self._keys = [torch.empty(0, dtype=torch.float64) for _ in parts]
            self._seen = [0] * len(parts)
        for number, part in enumerate(parts):
            keys = torch.rand(part.shape[1], generator=self._generator, dtype=torch.float64, device="cpu")
            keys = keys.to(part.device)
            old = self._keys[number]
            chosen = keys < old.max() if len(old) == self.size else torch.ones_like(keys, dtype=torch.bool)
            keys = torch.cat([old, keys[chosen]])
            values = torch.cat([self.values[number], part[:, chosen].float()], dim=1)
            if len(keys) > self.size:
                keep = keys.topk(self.size, largest=False, sorted=False).indices
                keys, values = keys[keep], values[:, keep]
            self._keys[number], self.values[number] = keys, values
            self._seen[number] += part.shape[1]

    def complete(self, part: int) -> bool:
        """True if the sample of this part is everything that was seen."""
        return self._seen[part] <= self.size
