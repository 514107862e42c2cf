"""What lands on a site: a histogram of it, with the levels that the site's number format can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.evaluate.inspection import watch_text
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site
from squamata.models.lm import LanguageModel
from squamata.report.rows import Arrays

BINS = 241


@dataclass(frozen=True)
class Distribution:
    """Counts (bins,) of the values between ``low`` and ``high``; ``levels``: what the format can represent, sorted,
    of the median of the site's scales (``scales`` in number); empty in float and for a scale taken at run time."""

    site: str
    counts: np.ndarray
    low: float
    high: float
    levels: np.ndarray
    scales: int

    @property
    def clipped(self) -> float:
        """Share of values in bins that lie wholly beyond the outermost levels."""
        if not self.levels.size:
            return 0.0
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        beyond = (edges[1:] < self.levels[0]) | (edges[:-1] > self.levels[-1])
        return float(self.counts[beyond].sum() / max(1, self.counts.sum()))


def observe_distributions(
    model: LanguageModel, documents: Sequence[str], globs: Sequence[str], max_tokens: int
) -> Arrays:
    """Distributions of the sites that match, as arrays; the stream is float, the weights are the model's.

    Two passes over the text: one for the range, one for the counts. SquamataError for a glob that matches no
    activation or state.
    """
    sites = list(model.sites())
    for glob in globs:
        if not any(fnmatchcase(site.name, glob) for site in sites):
            raise SquamataError(f"distributions: no activation or state matches '{glob}' (like layers.0.mixer.u)")
    chosen = [site for site in sites if any(fnmatchcase(site.name, glob) for glob in globs)]
    ranges: dict[str, tuple[float, float]] = {}
    watch_text(model, documents, chosen, _widen(ranges), max_tokens)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ranges}
    watch_text(model, documents, chosen, _count(ranges, counts), max_tokens)
    return {
        f"distribution.{site.name}.{part}": array
        for site in chosen
        for part, array in (
            ("counts", counts[site.name].numpy()),
            ("range", np.array(ranges[site.name])),
            ("levels", levels_of(site)),
            ("scales", np.array(0 if site.scale is None else site.scale.numel())),
        )
    }


def unpack_distributions(details: Arrays) -> list[Distribution]:
    """What ``observe_distributions`` gave."""
    names = [name.split(".", 1)[1].rsplit(".", 1)[0] for name in details if name.startswith("distribution.")]
    found = []
    for name in dict.fromkeys(names):
        counts, (low, high), levels, scales = (
            details[f"distribution.{name}.{part}"] for part in ("counts", "range", "levels", "scales")
        )
        found.append(Distribution(name, counts, float(low), float(high), levels, int(scales)))
    return found


def levels_of(site: Site) -> np.ndarray:
    """Every value that a tensor can have after landing here, for the median scale; none in float or at run time."""
    if site.spec is None or site.spec.dynamic or site.scale is None:
        return np.zeros(0)
    smallest, largest = site.spec.code_range
    codes = torch.arange(smallest, largest + 1, dtype=torch.float32)
    second = None if site.second is None else site.second.float().median().cpu()
    values = QTensor(codes, site.scale.float().median().cpu(), site.spec, second).dequantize()
    return np.unique(values.numpy().astype(np.float64))


def _widen(ranges: dict[str, tuple[float, float]]) -> Callable[[Site, Tensor], None]:
    def see(site: Site, x: Tensor) -> None:
        low, high = ranges.get(site.name, (0.0, 0.0))
        ranges[site.name] = (min(low, float(x.min())), max(high, float(x.max())))

    return see


def _count(ranges: dict[str, tuple[float, float]], counts: dict[str, Tensor]) -> Callable[[Site, Tensor], None]:
    def see(site: Site, x: Tensor) -> None:
        low, high = ranges[site.name]
        counts[site.name] += torch.histc(x.detach().float(), BINS, low, max(high, low + 1e-12)).double().cpu()

    return see
