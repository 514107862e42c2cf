"""What a checkpoint is made of, site by site; how two differ; and what fraction of a text's values is clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squamata.evaluate.size import tensor_bytes
from squamata.evaluate.windows import Progress, batches, cut, tokenizer_of
from squamata.kernels.codec import CODECS
from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, as_float
from squamata.kernels.site import Site, observing
from squamata.models.lm import model_layouts
from squamata.spec.quant import QuantSpec
from squamata.spec.sites import all_sites
from squamata.text import read_documents

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel

_WINDOW, _TOKENS, _ROWS = 512, 8192, 4


@dataclass(frozen=True)
class SiteRow:
    """How one site is represented. ``bits`` is None in float; ``scale_*`` are None without stored scales.

    ``bytes``: of the tensor as stored, scales included; of an activation or state the scales alone. ``clipped``:
    measured fraction of values beyond the outermost codes, if a text was given.
    """

    site: str
    layer: int | None
    kind: str
    format: str
    bits: int | None
    granularity: str | None
    strategy: str | None
    scales: int
    scale_min: float | None
    scale_median: float | None
    scale_max: float | None
    bytes: int
    clipped: float | None = None


@dataclass(frozen=True)
class SiteDifference:
    """One site in two checkpoints. ``scale_ratio``: of the second's scales to the first's, the one farthest from 1
    (of the medians where granularities differ); None unless both have scales. ``relative_difference``: of a weight's
    values, ||second - first|| / ||first||.
    """

    site: str
    first: str
    second: str
    first_scale: float | None
    second_scale: float | None
    scale_ratio: float | None
    relative_difference: float | None


def site_rows(model: LanguageModel, clipped: dict[str, float] | None = None) -> list[SiteRow]:
    """Every site of a model: activations and states, then tensors, in the order the data meets them."""
    sizes = tensor_bytes(model)
    kinds = {name: info.kind for name, info in all_sites(model.config.blocks).items()}
    stored: dict[str, int] = {}
    for name, tensor in model.checkpoint.site_tensors.items():
        site_name = name.rpartition(".")[0]
        stored[site_name] = stored.get(site_name, 0) + tensor.nbytes
    rows = []
    for site in model.sites():
        row = _row(site.name, kinds[site.name], "float", site.spec, site.scale, stored.get(site.name, 0))
        rows.append(row if clipped is None else replace(row, clipped=clipped.get(site.name)))
    layouts = model_layouts(model.config)
    for name, value in model.checkpoint.tensors.items():
        kind = kinds.get(name, "parameter")
        if isinstance(value, QTensor):
            scale = None if value.spec.tabulated else value.scale
            row = _row(name, kind, "", value.spec, scale, sizes[name])
            count = 0 if scale is None else prod(Partition(value.spec.granularity, layouts[name]).shape())
            rows.append(replace(row, scales=count))
        else:
            rows.append(_row(name, kind, str(value.dtype).removeprefix("torch."), None, None, sizes[name]))
    return rows


def _row(name: str, kind: str, float_format: str, spec: QuantSpec | None, scale: Tensor | None, stored: int) -> SiteRow:
    low, middle, high = (None, None, None) if scale is None else _low_middle_high(scale)
    return SiteRow(
        site=name,
        layer=int(name.split(".")[1]) if name.startswith("layers.") else None,
        kind=kind,
        format=float_format if spec is None else spec.form,
        bits=None if spec is None else spec.bits,
        granularity=None if spec is None else str(spec.granularity),
        strategy=None if spec is None else spec.describe().split(", ", 1)[1],
        scales=0 if scale is None else scale.numel(),
        scale_min=low,
        scale_median=middle,
        scale_max=high,
        bytes=stored,
    )


def _low_middle_high(scale: Tensor) -> tuple[float, float, float]:
    return float(scale.min()), float(scale.float().median()), float(scale.max())


def differences(first: LanguageModel, second: LanguageModel) -> list[SiteDifference]:
    """Sites whose format, scales or values differ: largest scale ratio first, then other formats, then values."""
    rows = [{row.site: row for row in site_rows(model)} for model in (first, second)]
    found = []
    for name in rows[0] | rows[1]:
        one, other = (some.get(name) for some in rows)
        if one is not None and other is not None:
            found.append(_difference(one, other, first, second))
        else:
            first_form, second_form = ("absent" if row is None else _represented(row) for row in (one, other))
            found.append(SiteDifference(name, first_form, second_form, None, None, None, None))
    return sorted(filter(_changed, found), key=_sort_key)


def _changed(row: SiteDifference) -> bool:
    return row.first != row.second or row.scale_ratio not in (None, 1.0) or bool(row.relative_difference)


def _sort_key(row: SiteDifference) -> tuple[float, bool, float, str]:
    ratio = row.scale_ratio or 1.0
    return -max(ratio, 1 / ratio), row.first == row.second, -(row.relative_difference or 0.0), row.site


def _difference(one: SiteRow, other: SiteRow, first: LanguageModel, second: LanguageModel) -> SiteDifference:
    relative = None
    if one.site in first.checkpoint.tensors:
        values, others = (as_float(model.checkpoint.tensors[one.site]).double() for model in (first, second))
        if values.shape == others.shape:
            relative = float((others - values).norm() / values.norm().clamp_min(1e-30))
    return SiteDifference(
        one.site,
        _represented(one),
        _represented(other),
        one.scale_median,
        other.scale_median,
        _farthest_ratio(_scale(first, one.site), _scale(second, one.site)),
        relative,
    )


def _represented(row: SiteRow) -> str:
    return row.format if row.bits is None else f"{row.format} per {row.granularity}, {row.strategy}"


def _scale(model: LanguageModel, name: str) -> Tensor | None:
    value = model.checkpoint.tensors.get(name)
    if value is not None:
        return value.scale if isinstance(value, QTensor) and not value.spec.tabulated else None
    return model.checkpoint.site_tensors.get(f"{name}.scale")


def _farthest_ratio(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None:
        return None
    if one.shape != other.shape:
        return float(other.float().median() / one.float().median())
    ratios = (other.float() / one.float()).reshape(-1)
    return float(ratios[ratios.log().abs().argmax()])


def clipped_fractions(
    model: LanguageModel, text: str | Path, max_tokens: int = _TOKENS, progress: Progress | None = None
) -> dict[str, float]:
    """Site name -> fraction of the values that land there on a text and lie beyond the outermost codes.

    The float-valued stream is observed, activations not rounded; the weights are the checkpoint's own, so quantized
    ones differ from those that calibration saw. Documents run in windows of 512 tokens, each from a fresh state, and
    the state is looked at every 64 tokens, as in calibration. Sites with a dynamic scale are left out.
    """
    sites = [site for site in model.sites() if site.spec is not None and not site.spec.dynamic]
    counts = {site.name: [0, 0] for site in sites}

    def see(site: Site, x: Tensor) -> None:
        count_clipped(site, x, counts[site.name])

    watch_text(model, read_documents(text), sites, see, max_tokens, progress)
    return {name: beyond / seen for name, (beyond, seen) in counts.items() if seen}


@torch.no_grad()
def watch_text(
    model: LanguageModel,
    documents: Sequence[str],
    sites: Iterable[Site],
    callback: Callable[[Site, Tensor], None],
    max_tokens: int | None = _TOKENS,
    progress: Progress | None = None,
) -> None:
    """``callback(site, tensor)`` sees what lands on these sites while the model reads the documents, nothing rounded.

    Windows of 512 tokens, each from a fresh state and of one document; the state is looked at every 64 tokens.
    """
    corpus = cut(documents, tokenizer_of(model), _WINDOW, max_tokens)
    modes = {site.name: site.mode for site in model.sites()}
    model.set_mode("observe")
    done = 0
    try:
        with observing(sites, callback):
            for batch in batches(corpus.windows, lambda length: _ROWS, mixed_lengths=False):
                model.forward(batch.ids, model.new_cache(len(batch.ids)), last_only=True)
                done += batch.predicted
                if progress is not None:
                    progress(done, corpus.tokens)
    finally:
        for site in model.sites():
            site.mode = modes[site.name]


def count_clipped(site: Site, x: Tensor, count: list[int]) -> None:
    """Add (values beyond the outermost codes, values) to ``count``; the site has a static scale."""
    assert site.spec is not None
    count[0] += int(CODECS[site.spec.codec].beyond(x, site.grid(x), site.spec).sum())
    count[1] += x.numel()
