"""Outlier channels (Mamba-PTQ, arXiv 2407.12397): which there are, whether they stay, and what zeroing them does.

A channel of a site is an outlier if its largest magnitude is more than six standard deviations above the mean of the
largest magnitudes of that layer's channels (the paper: 'abs-max > 6 sigma from the layer mean').
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.evaluate.inspection import watch_text
from squamata.evaluate.perplexity import Evaluation, paired_difference
from squamata.evaluate.result import Result
from squamata.evaluate.uncertainty import Interval
from squamata.kernels.site import Site
from squamata.models.lm import LanguageModel
from squamata.report.sensitivity import Judge, Progress
from squamata.spec.sites import all_sites

SIGMAS = 6.0

Channels = dict[str, tuple[int, ...]]  # site -> its outlier channels


@dataclass(frozen=True)
class OutlierRow(Result):
    """One site of one layer. ``largest``: the largest |x| over the mean of the channels' largest; ``documents``: share
    of documents (None for one) in which an outlier channel is one by that document alone; ``layers``: share of the
    model's other layers in which the same channel is an outlier; both are means over the channels."""

    site: str
    layer: int
    part: str
    channels: int
    outliers: list[int]
    largest: float
    documents: float | None
    layers: float | None


@dataclass(frozen=True)
class Zeroed(Result):
    """A part's outlier channels (``mixer.x`` of all layers) set to zero, and as many others drawn at random."""

    part: str
    channels: int
    perplexity: float
    perplexity_ci: Interval | None
    kl: float
    kl_ci: Interval | None
    verdict: str
    random_perplexity: float
    random_kl: float


@dataclass(frozen=True)
class OutlierStudy(Result):
    """``rows``: every site of every layer, in the order of the data; ``zeroed``: parts that have outliers."""

    sigmas: float
    documents: int
    tokens: int
    float_perplexity: float
    rows: list[OutlierRow]
    zeroed: list[Zeroed]


def study_outliers(
    model: LanguageModel, judge: Judge, sites: str = "*", sigmas: float = SIGMAS, progress: Progress | None = None
) -> OutlierStudy:
    """Find outlier channels on the judge's text and zero them. The model is read in float, nothing rounded.

    ``sites``: a glob over activations (states have no single channel axis and are left out).
    """
    chosen = _activations(model, sites)
    peaks = _peaks(model, chosen, judge)
    found = {name: outlier_channels(peak.amax(0), sigmas) for name, peak in peaks.items()}
    rows = [_row(name, peaks[name], found, sigmas) for name in peaks]
    parts = [
        part for part in dict.fromkeys(row.part for row in rows) if any(found[n] for n in found if _part(n) == part)
    ]
    plain = judge(model)
    zeroed = []
    for number, part in enumerate(parts, start=1):
        zeroed.append(_zero_part(model, judge, plain, part, {n: c for n, c in found.items() if _part(n) == part}))
        if progress is not None:
            progress(number, len(parts))
    return OutlierStudy(sigmas, plain.documents, plain.tokens, plain.perplexity, rows, zeroed)


def outlier_channels(peaks: Tensor, sigmas: float = SIGMAS) -> tuple[int, ...]:
    """Channels whose peak |x| (channels,) is more than ``sigmas`` standard deviations above the channels' mean."""
    bound = peaks.mean() + sigmas * peaks.std(correction=0)
    return tuple(torch.nonzero(peaks > bound).flatten().tolist())


def _activations(model: LanguageModel, glob: str) -> list[Site]:
    kinds = all_sites(model.config.blocks)
    chosen = [site for site in model.sites() if kinds[site.name].kind == "activation" and fnmatchcase(site.name, glob)]
    if not chosen:
        raise SquamataError(f"no activation site matches '{glob}' (like *.mixer.x, layers.0.*)")
    return chosen


def _peaks(model: LanguageModel, sites: Sequence[Site], judge: Judge) -> dict[str, Tensor]:
    """Site -> largest |x| of every channel in every document, (documents, channels)."""
    peaks: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    left = judge.max_tokens

    for document in judge.documents:
        if left is not None and left < 2:
            break
        here: dict[str, Tensor] = {}
        read = _watch_document(model, document, sites, here, left)
        left = None if left is None else left - read
        for name, peak in here.items():
            peaks[name].append(peak)
    return {name: torch.stack(some) for name, some in peaks.items() if some}


def _watch_document(
    model: LanguageModel, document: str, sites: Sequence[Site], here: dict[str, Tensor], left: int | None
) -> int:
    """Fill ``here`` with the peaks of one document; returns the tokens read, 0 for a document too short to read."""
    read = 0

    def advance(done: int, _total: int) -> None:
        nonlocal read
        read = done

    def see(site: Site, x: Tensor) -> None:
        peak = x.detach().abs().flatten(0, -2).amax(0).float()
        here[site.name] = torch.maximum(here[site.name], peak) if site.name in here else peak

    if len(model.tokenizer.encode(document)) > 2:
        watch_text(model, [document], sites, see, left, advance)
    return read


def _part(site: str) -> str:
    return site.split(".", 2)[2] if site.startswith("layers.") else site


def _row(name: str, peaks: Tensor, found: Mapping[str, Sequence[int]], sigmas: float) -> OutlierRow:
    outliers, overall = found[name], peaks.amax(0)
    others = [set(channels) for other, channels in found.items() if other != name and _part(other) == _part(name)]
    by_document = [set(outlier_channels(document, sigmas)) for document in peaks]
    return OutlierRow(
        site=name,
        layer=int(name.split(".")[1]) if name.startswith("layers.") else -1,
        part=_part(name),
        channels=peaks.shape[1],
        outliers=list(outliers),
        largest=float(overall.max() / overall.mean().clamp_min(1e-30)),
        documents=_persistence(outliers, by_document) if len(by_document) > 1 else None,
        layers=_persistence(outliers, others),
    )


def _persistence(channels: Sequence[int], elsewhere: Sequence[set[int]]) -> float | None:
    """Mean over the channels of the share of places that have it too; None without channels or places."""
    if not channels or not elsewhere:
        return None
    return sum(channel in some for channel in channels for some in elsewhere) / (len(channels) * len(elsewhere))


@contextmanager
def zeroing(model: LanguageModel, channels: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Within the block these channels of these activation sites are zero for whatever reads them.

    A site's observer gets the very tensor that goes on, before it is rounded, so it can change it; while a site has an
    observer every op composes its steps, and none passes the site by.
    """
    sites = [site for site in model.sites() if channels.get(site.name)]
    before = [(site, site.observer) for site in sites]
    try:
        for site in sites:
            site.observer = partial(_erase, channels=torch.tensor(channels[site.name]))
        yield
    finally:
        for site, observer in before:
            site.observer = observer


def _erase(x: Tensor, channels: Tensor) -> None:
    x[..., channels] = 0.0


def _zero_part(
    model: LanguageModel, judge: Judge, plain: Evaluation, part: str, channels: Mapping[str, Sequence[int]]
) -> Zeroed:
    sizes = {site.name: site.layout.flat_size for site in model.sites()}
    draw = random.Random(0)
    others = {
        name: draw.sample(sorted(set(range(sizes[name])) - set(some)), min(len(some), sizes[name] - len(some)))
        for name, some in channels.items()
    }
    with zeroing(model, channels):
        judged = judge(model)
    with zeroing(model, others):
        control = judge(model)
    assert judged.kl is not None and control.kl is not None
    return Zeroed(
        part=part,
        channels=sum(map(len, channels.values())),
        perplexity=judged.perplexity,
        perplexity_ci=judged.perplexity_ci,
        kl=judged.kl,
        kl_ci=judged.kl_ci,
        verdict=paired_difference(plain, judged).verdict,
        random_perplexity=control.perplexity,
        random_kl=control.kl,
    )


def as_data(study: OutlierStudy, model: str) -> dict[str, object]:
    """What ``--json`` writes and a report reads."""
    rows, zeroed = [row.to_dict() for row in study.rows], [row.to_dict() for row in study.zeroed]
    return {"kind": "outliers", "model": model} | study.to_dict() | {"rows": rows, "zeroed": zeroed}
