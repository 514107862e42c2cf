"""Learned scales: the gradient is LSQ's, and what is learned reconstructs the layer better than what was found."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.calibrate.learn import check_tuner as check
from squamata.calibrate.learn import lsq, reconstruction_error
from squamata.calibrate.observe import attach, run_layer, scales_of
from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site
from squamata.models.block import Block
from squamata.models.checkpoint import under
from squamata.models.lm import build_block
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

CHANNELS = Layout(("channel",), (6,))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group(4)", "index"])
@pytest.mark.parametrize("rounding", ["half-even", "half-away", "truncate"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_scale_is_lsqs(granularity: str, rounding: Any, symmetric: bool) -> None:
    """Equation 3: round(x/s) - x/s inside the range, the last code beyond it; and the values do not change."""
    spec = QuantSpec(bits=4, granularity=granularity, rounding=rounding, symmetric=symmetric)
    index = torch.tensor([0, 2, 1, 1, 0, 2]) if granularity == "index" else None
    site = Site("site", CHANNELS, spec, index=index, mode="simulate")
    shape = site.partition.shape()
    scale = (0.05 * torch.arange(1.0, 1 + prod(shape)) + 0.1).reshape(shape).requires_grad_()
    point = 0.0 if symmetric else -3.0
    zero = None if symmetric else torch.full(shape, point)
    x, upstream = torch.randn(2, 2, 9, 6, generator=torch.Generator().manual_seed(0))
    site.set_scale(scale, zero)
    landed = site.land(x)
    assert isinstance(landed, QTensor)
    (landed.dequantize() * upstream).sum().backward()

    site.set_scale(scale.detach(), zero)
    plain = site.land(x)
    assert isinstance(plain, QTensor) and torch.equal(plain.dequantize(), landed.dequantize().detach())
    step = site.expanded()[0]
    low, high = (limit - point for limit in spec.code_range)
    inside = (x / step >= low) & (x / step <= high)
    assert 0 < inside.sum() < inside.numel()
    slope = torch.where(inside, plain.codes() - x / step, plain.codes()) * upstream
    group = site.partition.expand(torch.arange(float(prod(shape))).reshape(shape)).expand(6).long()
    expected = torch.zeros(prod(shape)).index_add(0, group, slope.sum((0, 1)))
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.reshape(-1), expected, rtol=1e-4, atol=1e-4)


SITES = {"mamba1": ("in", "x", "z", "u", "dt", "out"), "mamba2": ("in", "x", "z", "B", "C", "u", "B_conv", "out")}
WIDE = {"mamba1": ("x", "z", "dt"), "mamba2": ("x", "z", "u")}  # a scale may vary along their channels


def layer(kind: str, granularity: str = "tensor", bits: int = 4) -> tuple[Block, Block, list[Any]]:
    """A float layer, the same in simulation with minmax scales, and a stream of three batches."""
    config = config_of(kind)
    tensors = perturbed_tensors(config)
    specs = {f"layers.0.mixer.{site}": QuantSpec(bits=bits) for site in SITES[kind]}
    specs |= {f"layers.0.mixer.{site}": QuantSpec(bits=bits, granularity=granularity) for site in WIDE[kind]}
    maps = {}
    if granularity == "index":
        shape = (4, 16) if kind == "mamba2" else (64,)
        maps = {f"mixer.{site}.index": torch.arange(64).reshape(shape) % 5 for site in WIDE[kind]}
    teacher = build_block(config, 0, under("layers.0.", tensors), site_tensors=maps)
    table = tensors["embedding.weight"]
    stream = [table[random_ids(config, 2, 12, seed)] for seed in range(3)]
    statistics = attach(teacher.sites.values(), specs)
    with use_backend("ref"):
        run_layer(teacher, list(stream))
    for site in teacher.sites.values():
        site.observer = None
    found = under("layers.0.", scales_of(statistics, specs))
    student = build_block(config, 0, under("layers.0.", tensors), under("layers.0.", specs), found, "simulate")
    return teacher, student, stream


def error_of(teacher: Block, student: Block, stream: list[Any]) -> float:
    with use_backend("ref"):
        return reconstruction_error(teacher, student, stream)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "index"])
def test_learned_scales_reconstruct_the_layer_better(kind: str, granularity: str) -> None:
    teacher, student, stream = layer(kind, granularity)
    before = error_of(teacher, student, stream)
    start = {site.name: site.scale for site in student.sites.values() if site.scale is not None}
    learned = lsq(teacher, student, stream, steps=30, learning_rate=0.03)
    assert error_of(teacher, student, stream) < 0.9 * before
    assert set(learned) == {f"{name}.scale" for name in start}
    for name, scale in start.items():
        assert learned[f"{name}.scale"].shape == scale.shape and not learned[f"{name}.scale"].requires_grad
        assert not torch.equal(learned[f"{name}.scale"], scale)
    again = lsq(*layer(kind, granularity), steps=30, learning_rate=0.03)
    assert all(torch.equal(again[name], scale) for name, scale in learned.items())


def test_scales_that_became_worse_are_not_kept() -> None:
    teacher, student, stream = layer("mamba2", bits=8)
    start = {f"{site.name}.scale": site.scale for site in student.sites.values() if site.scale is not None}
    before = error_of(teacher, student, stream)
    learned = lsq(teacher, student, stream, steps=3, learning_rate=3.0)
    assert all(torch.equal(learned[name], scale) for name, scale in start.items())
    assert error_of(teacher, student, stream) == before


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_recipe_tunes_what_is_static_and_keeps_the_rest(kind: str) -> None:
    """Through the pipeline, quantized weights included: other activation scales, everything else as without."""
    config = config_of(kind)
    tensors, batches = perturbed_tensors(config), [random_ids(config, 2, 20)]
    rules = [{"site": "*.mixer.*", "spec": {"bits": 4}}, {"site": "*.mixer.y", "spec": "float"}]
    plain = quantized(config, tensors, recipe_of(*rules, transforms=["hadamard"]), batches)
    recipe = recipe_of(*rules, transforms=["hadamard"], tune={"lsq": {"steps": 12, "learning_rate": 0.02}})
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    tuned = quantized(config, tensors, recipe, batches)
    assert set(tuned.site_tensors) == set(plain.site_tensors)
    changed = {name for name, scale in plain.site_tensors.items() if not torch.equal(scale, tuned.site_tensors[name])}
    states = {name for name in plain.site_tensors if ".state." in name}
    assert changed and not changed & states and {name.split(".")[1] for name in changed} == {"0", "1"}
    for name, value in plain.tensors.items():
        assert not isinstance(value, QTensor) or torch.equal(value.data, tuned.tensors[name].data)


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ("lsqq", ["did you mean 'lsq'"]),
        ({"lsq": {"step": 3}}, ["did you mean 'steps'"]),
        ({"lsq": {"steps": 0}}, ["steps"]),
    ],
)
def test_mistakes_in_tune_are_named(tune: Any, words: list[str]) -> None:
    with pytest.raises(SquamataError) as caught:
        check(recipe_of(tune=tune))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
