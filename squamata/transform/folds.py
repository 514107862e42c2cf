"""Where a factor for every channel of a product's input can be folded exactly, so that nothing is left for run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.models.config import ModelConfig, segments
from squamata.scales.statistics import Statistics

Product = Literal["in_proj", "dt_proj", "out_proj", "conv"]
Rows = tuple[int, int | None]  # from, to
EVERY: Rows = (0, None)
READS: dict[Product, tuple[str, ...]] = {
    "in_proj": ("mixer.in",),
    "dt_proj": ("mixer.dt_low",),
    "out_proj": ("mixer.out",),
    "conv": ("mixer.x", "mixer.B", "mixer.C"),
}
SITES = tuple(site for sites in READS.values() for site in sites)


@dataclass(frozen=True)
class Fold:
    """``site`` (in ``mixer``), which the tensors ``before`` write and the weight ``after`` multiplies.

    The site's channels are the entries ``before_rows`` of the first axis of every tensor before, and the entries
    ``after_rows`` of axis ``axis`` of the weight.
    """

    site: str
    before: tuple[str, ...]
    after: str
    axis: int = 1
    before_rows: Rows = EVERY
    after_rows: Rows = EVERY

    def largest(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Largest magnitude of what multiplies each channel, float64 (channels,)."""
        return tensors[self.after].double().movedim(self.axis, 0)[slice(*self.after_rows)].abs().amax(1)

    def apply(self, tensors: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """All tensors, the site divided by the factors (channels,) and the weight multiplied with them, in float64;
        float32 where they were narrower.
        """
        changed = dict(tensors)
        for name in self.before:
            tensor = tensors[name].to(torch.float64, copy=True)
            tensor[slice(*self.before_rows)] /= factors.double().reshape(-1, *[1] * (tensor.ndim - 1))
            changed[name] = _stored(tensor, tensors[name])
        weight = tensors[self.after].to(torch.float64, copy=True)
        weight.movedim(self.axis, 0)[slice(*self.after_rows)] *= factors.double()[:, None]
        return changed | {self.after: _stored(weight, tensors[self.after])}


def folds(config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], product: Product) -> list[Fold]:
    """The inputs of a product that what comes before them can be folded into; none where SiLU or a norm stands between.

    in_proj: the norm's weight. dt_proj (Mamba-1 without norms on dt, B and C): x_proj's first rows. out_proj (Mamba-2):
    the gated norm's weight. conv: in_proj's rows of what it filters, x, and of a Mamba-2 B and C. SquamataError if
    out_proj's input is rotated already.
    """
    if kind not in ("mamba1", "mamba2"):
        return []
    if product == "in_proj":
        return [Fold("in", ("norm.weight",), "mixer.in_proj.weight")]
    if product == "conv":
        return _before_convolution(config, kind, tensors)
    if product == "dt_proj":
        free = kind == "mamba1" and config.bcdt_norm_epsilon is None
        rows = (0, config.dt_rank)
        return [Fold("dt_low", ("mixer.x_proj.weight",), "mixer.dt_proj.weight", before_rows=rows)] if free else []
    if "mixer.rotation" in tensors:
        raise SquamataError("transforms that scale out_proj's input come before hadamard, which mixes its channels")
    return [Fold("out", ("mixer.gate_norm.weight",), "mixer.out_proj.weight")] if kind == "mamba2" else []


def _before_convolution(config: ModelConfig, kind: str, tensors: Mapping[str, Tensor]) -> list[Fold]:
    before = tuple(name for name in ("mixer.in_proj.weight", "mixer.in_proj.bias") if name in tensors)
    ends = [0, *accumulate(segments(kind, config)["in_proj"])]
    names = {"x": 0} if kind == "mamba1" else {"x": 1, "B": 2, "C": 3}
    found, start = [], 0
    for site, number in names.items():
        rows = (ends[number], ends[number + 1])
        stop = start + rows[1] - rows[0]
        found.append(Fold(site, before, "mixer.conv.weight", 0, rows, (start, stop)))
        start = stop
    return found


def largest_seen(statistics: Mapping[str, Statistics], fold: Fold) -> Tensor:
    """Largest magnitude of every channel of the fold's site, float64 (channels,)."""
    low, high = statistics[f"mixer.{fold.site}"].magnitude()
    return torch.maximum(low.abs(), high.abs()).flatten().double()


def _stored(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(like.dtype, torch.float32))
