"""Smoothing: float64 logits stay, the factors are the paper's, and what is smoothed is flatter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import MemorySource, Tensors, config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.site import observing
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts

EVERY = ["in_proj", "dt_proj", "out_proj", "conv"]
INPUTS = {
    "mamba1": {"in_proj": ["in"], "dt_proj": ["dt_low"], "out_proj": [], "conv": ["x"]},
    "mamba2": {"in_proj": ["in"], "dt_proj": [], "out_proj": ["out"], "conv": ["x", "B", "C"]},
}
PAIRS = [(kind, product) for kind in INPUTS for product in INPUTS[kind]]


def transformed(config: ModelConfig, tensors: Tensors, transforms: list[Any], ids: torch.Tensor) -> Checkpoint:
    parts = QuantizedParts(MemorySource(config, tensors), recipe_of(transforms=transforms), [ids])
    merged = {name: value for part in parts.each() for name, value in part.items()}
    return Checkpoint(parts.config, merged, recipe_of(transforms=transforms))


def writer(config: ModelConfig, kind: str) -> dict[str, tuple[str, int]]:
    """Which tensor's which row writes one channel of a site."""
    E, GN = config.d_inner, config.n_groups * config.d_state
    x = 0 if kind == "mamba1" else E
    rows = {"x": x + 1, "B": x + E + 1, "C": x + E + GN + 1}
    convolved = {site: ("mixer.in_proj.weight", row) for site, row in rows.items()}
    norms = {"in": ("norm.weight", 5), "out": ("mixer.gate_norm.weight", 5)}
    return {**norms, "dt_low": ("mixer.x_proj.weight", 1), **convolved}


@torch.no_grad()
def seen_at(model: LanguageModel, ids: torch.Tensor, site: str) -> torch.Tensor:
    """Largest |x| of every channel of a site of the first layer."""
    seen: list[torch.Tensor] = []
    with observing([model.blocks[0].sites[site]], lambda _, x: seen.append(x)):
        model(ids)
    return seen[0].abs().amax((0, 1)).flatten().double()


@pytest.mark.parametrize("transforms", [["smooth"], [{"smooth": {"products": EVERY, "alpha": 0.7}}, "hadamard"]])
@pytest.mark.parametrize("norms", [None, 1e-6])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_the_logits_stay(kind: str, norms: float | None, transforms: list[Any]) -> None:
    config = config_of(kind, projection_bias=True, bcdt_norm_epsilon=norms if kind == "mamba1" else None)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 2, 19)
    before = float_model(config, tensors, torch.float64)(ids)
    changed = transformed(config, tensors, transforms, ids)
    assert not torch.equal(changed.tensors["layers.1.norm.weight"], tensors["layers.1.norm.weight"])  # type: ignore[arg-type]
    after = LanguageModel(changed, "float", torch.float64)(ids)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9


@pytest.mark.parametrize("kind, product", PAIRS)
@torch.no_grad()
def test_the_factors_are_the_papers_and_the_channels_flatter(kind: str, product: str) -> None:
    """At alpha 0.5 activation and weight share each channel's size: both maxima are sqrt(max |x| max |W|)."""
    config = config_of(kind)
    tensors = perturbed_tensors(config)
    for site in INPUTS[kind][product]:
        name, row = writer(config, kind)[site]
        tensors[f"layers.0.{name}"][row] *= 40
    ids = random_ids(config, 4, 40)
    changed = transformed(config, tensors, [{"smooth": {"products": [product]}}], ids)
    plain, smoothed = float_model(config, tensors), LanguageModel(changed, "float")
    for site in INPUTS[kind][product]:
        before, after = seen_at(plain, ids, site), seen_at(smoothed, ids, site)
        weight = tensors[f"layers.0.mixer.{product}.weight"].double().abs()
        if product == "conv":
            start = {"x": 0, "B": config.d_inner, "C": config.d_inner + config.n_groups * config.d_state}[site]
            read = weight[start : start + len(before)].amax(1)
        else:
            read = weight.amax(0)
        torch.testing.assert_close(after, (before * read).sqrt(), rtol=2e-4, atol=1e-6)
        assert float(after.max() / after.median()) < 0.5 * float(before.max() / before.median())
    if not INPUTS[kind][product]:
        assert all(torch.equal(changed.tensors[name], tensors[name]) for name in tensors)  # type: ignore[arg-type]


@torch.no_grad()
def test_what_it_is_for() -> None:
    """One channel of the gated norm a hundred times the others: eight bits per tensor at `out` lose less smoothed."""
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    tensors["layers.0.mixer.gate_norm.weight"][5] = 100.0
    ids = random_ids(config, 4, 40)
    plain = float_model(config, tensors)(ids)
    errors = []
    for transforms in ([], ["smooth"]):
        recipe = recipe_of({"site": "*.mixer.out", "spec": {"bits": 8}}, transforms=transforms)
        logits = LanguageModel(quantized(config, tensors, recipe, [ids]), "simulate")(ids)
        errors.append(float((logits - plain).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_after_a_rotation_it_is_refused() -> None:
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    with pytest.raises(SquamataError, match="before hadamard"):
        transformed(config, tensors, ["hadamard", "smooth"], random_ids(config, 1, 9))
