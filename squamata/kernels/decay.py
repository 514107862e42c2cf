"""The scan's decay exp(dt A), and the sites that a recipe may give it: its exponent, its value, or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from squamata.kernels.qtensor import QTensor, as_float
from squamata.kernels.site import Site, working

TOGETHER = 64  # tokens whose decays are held at a time: Mamba-1 has one an (inner channel, state index)
NOTHING = 1e-300  # a decay of 0, where its logarithm is wanted


class DecaySites(NamedTuple):
    """Where dt A (``log_decay``) and exp(dt A) (``decay``) land; None where nothing happens."""

    log_decay: Site | None
    decay: Site | None

    @classmethod
    def of(cls, sites: Mapping[str, Site]) -> DecaySites | None:
        """Those of a layer's sites that round or observe something; None if neither does."""
        found = working(sites, cls._fields)
        return cls(*found) if any(found) else None

    def each(self, dt: Tensor, A: Tensor) -> Iterator[Tensor]:
        """dt (B, L, E), A (E, N) -> the decay of every token in turn, (B, E, N)."""
        for part in dt.split(TOGETHER, dim=1):
            decay = torch.exp(_landed(self.log_decay, part[..., None] * A))
            yield from _landed(self.decay, decay).unbind(1)

    def logarithm(self, dt: Tensor, A: Tensor) -> Tensor:
        """dt (B, L, H), A (H,) -> log of the decay (B, L, H), float64."""
        exponent = _landed(self.log_decay, dt * A)
        decay = None if self.decay is None else self.decay.land(torch.exp(exponent))
        if not isinstance(decay, QTensor):  # in float, the sum of exponents is more exact
            return exponent.double()
        return decay.dequantize(A.dtype).double().clamp_min(NOTHING).log()


def _landed(site: Site | None, x: Tensor) -> Tensor:
    """x (B, L, ...features) as the site represents it."""
    return x if site is None else as_float(site.land(x.flatten(2)), x.dtype).reshape(x.shape)
