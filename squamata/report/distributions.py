"""What lands on a site: a histogram of it, with the levels that the site's number format can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.evaluate.inspection import count_clipped, watch_text
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site
from squamata.models.lm import LanguageModel
from squamata.report.rows import Arrays

BINS = 241


@dataclass(frozen=True)
class Distribution:
    """Counts (bins,) of the values between ``low`` and ``high``; ``levels``: what the format can represent, sorted,
    of the median of the site's scales (``scales`` in number); empty in float and for a scale taken at run time.
    ``clipped``: share of the values beyond the outermost codes of their own scales, as ``squamata inspect`` counts it;
    None where there are no levels, and in rows of before this was kept."""

    site: str
    counts: np.ndarray
    low: float
    high: float
    levels: np.ndarray
    scales: int
    clipped: float | None = None


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
    clipped = {site.name: [0, 0] for site in chosen if has_levels(site)}
    watch_text(model, documents, chosen, _count(ranges, counts, clipped), max_tokens)
    return {
        f"distribution.{site.name}.{part}": array
        for site in chosen
        for part, array in (
            ("counts", counts[site.name].numpy()),
            ("range", np.array(ranges[site.name])),
            ("levels", levels_of(site)),
            ("scales", np.array(0 if site.scale is None else site.scale.numel())),
            ("clipped", np.array(clipped.get(site.name, [0, 0]))),
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
        beyond, seen = details.get(f"distribution.{name}.clipped", np.zeros(2))
        clipped = float(beyond / seen) if seen else None
        found.append(Distribution(name, counts, float(low), float(high), levels, int(scales), clipped))
    return found


def has_levels(site: Site) -> bool:
    """True if what lands here is rounded by a scale that was calibrated."""
    return site.spec is not None and not site.spec.dynamic and site.scale is not None


def levels_of(site: Site) -> np.ndarray:
    """Every value that a tensor can have after landing here, for the median scale; none in float or at run time."""
    if site.spec is None or site.scale is None or not has_levels(site):
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


def _count(
    ranges: dict[str, tuple[float, float]], counts: dict[str, Tensor], clipped: dict[str, list[int]]
) -> Callable[[Site, Tensor], None]:
    def see(site: Site, x: Tensor) -> None:
        low, high = ranges[site.name]
        counts[site.name] += torch.histc(x.detach().float(), BINS, low, max(high, low + 1e-12)).double().cpu()
        if site.name in clipped:
            count_clipped(site, x, clipped[site.name])

    return see
