"""Histograms count every value, and the levels drawn over them are those that the site rounds to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import squamata
from squamata.errors import SquamataError
from squamata.evaluate.inspection import clipped_fractions
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import as_float
from squamata.kernels.site import Site
from squamata.load.hub import bundled
from squamata.report.distributions import levels_of, observe_distributions, unpack_distributions
from squamata.report.site_figures import _grid_words
from squamata.spec.quant import QuantSpec
from squamata.text import read_documents


def test_every_value_is_counted_and_clipping_is_that_of_inspect(shipped: Callable[[str, str], Path]) -> None:
    model = squamata.load(shipped("mamba2", "quamba-w8a8"))
    excerpt = bundled() / "excerpt.jsonl"
    arrays = observe_distributions(model, read_documents(excerpt), ["layers.[06].mixer.u", "layers.0.mixer.state"], 300)
    found = {entry.site: entry for entry in unpack_distributions(arrays)}
    assert list(found) == ["layers.0.mixer.u", "layers.0.mixer.state", "layers.6.mixer.u"]
    clipped = clipped_fractions(model, excerpt, 300)
    for site in ("layers.0.mixer.u", "layers.6.mixer.u"):
        entry = found[site]
        assert entry.counts.sum() == 300 * model.config.d_inner
        assert entry.low < 0 < entry.high and len(entry.levels) == 255
        assert entry.clipped == clipped[site]
        scale = float(model.checkpoint.site_tensors[f"{site}.scale"])
        np.testing.assert_allclose(np.diff(entry.levels), scale, rtol=1e-4)
    state = found["layers.0.mixer.state"]  # its scale is taken at run time
    assert state.levels.size == 0 and state.clipped is None
    assert {site.mode for site in model.sites()} == {"integer"} and all(s.observer is None for s in model.sites())


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4),
        QuantSpec(bits=3, full_range=True),
        QuantSpec(bits=4, symmetric=False),
        QuantSpec(bits=2),
        QuantSpec(bits=5, codec="dual-scale"),
        QuantSpec(bits=9, codec="soft-edge"),
    ],
)
def test_levels_are_the_values_that_landing_gives(spec: QuantSpec) -> None:
    second = {None: None, "zero": torch.tensor(-3.0)}.get(spec.second, torch.tensor(4.0))
    site = Site("s", Layout(("channel",), (4,)), spec, torch.tensor(0.25), second, mode="integer")
    landed = as_float(site.land(torch.linspace(-120, 120, 40_000).reshape(-1, 4)))
    np.testing.assert_array_equal(levels_of(site), np.unique(landed.numpy()))


def test_sites_without_a_static_scale_have_no_levels() -> None:
    layout = Layout(("channel",), (4,))
    assert levels_of(Site("s", layout)).size == 0
    assert levels_of(Site("s", layout, QuantSpec(bits=8, dynamic=True))).size == 0


def test_clipping_is_counted_with_every_groups_own_scale(shipped: Callable[[str, str], Path]) -> None:
    """u of quamba2 has many scales: the levels drawn are those of their median, which clips otherwise."""
    model = squamata.load(shipped("mamba2", "quamba2-w8a8"))
    excerpt = bundled() / "excerpt.jsonl"
    (entry,) = unpack_distributions(observe_distributions(model, read_documents(excerpt), ["layers.6.mixer.u"], 300))
    assert entry.scales > 1 and entry.clipped == clipped_fractions(model, excerpt, 300)["layers.6.mixer.u"]
    assert "drawn for the median of" in _grid_words(entry) and "clipped: " in _grid_words(entry)


def test_rows_of_before_clipping_was_kept_are_read() -> None:
    parts = {
        "counts": np.ones(3),
        "range": np.array([-1.0, 1.0]),
        "levels": np.array([-1.0, 1.0]),
        "scales": np.array(1),
    }
    (entry,) = unpack_distributions({f"distribution.s.{name}": part for name, part in parts.items()})
    assert entry.clipped is None and "clipped" not in _grid_words(entry)


def test_an_unknown_glob_is_refused(shipped: Callable[[str, str], Path]) -> None:
    model = squamata.load(shipped("mamba2", "quamba-w8a8"))
    with pytest.raises(SquamataError, match="no activation or state matches"):
        observe_distributions(model, ["some text"], ["*.weight"], 100)
