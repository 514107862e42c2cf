"""Mean correction: the bias by its formula, written out over whole models, and carried by every way to run one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MemorySource, config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.calibrate.correct import OUTPUT_BIAS, check_correction
from squamata.errors import SquamataError
from squamata.kernels import ops
from squamata.kernels.dispatch import use_backend
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts
from squamata.pipeline import check
from squamata.run.graphs import CapturedDecoder
from squamata.run.model import Model
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.recipe import Recipe

KINDS = ("mamba1", "mamba2")
WIDE = {"mamba1": {"dt_rank": 16}, "mamba2": {"head_dim": 32}}  # what the GPU kernels take


def corrected(kind: str, base: str | None, decay: float, **overrides: Any) -> tuple[Checkpoint, Checkpoint]:
    """A model, and its checkpoint corrected; calibrated on ``batches()``."""
    config = config_of(kind, **overrides)
    tensors = perturbed_tensors(config)
    fields = {"extends": base, "transforms": ["hadamard"]} if base else {}  # a rotated stream has other means
    recipe = recipe_of(correct={"mean": {"decay": decay}}, **fields)
    found = quantized(config, tensors, recipe, batches(config))
    return Checkpoint(config, tensors, Recipe.read("float")), found


def batches(config: Any) -> list[torch.Tensor]:
    """Two batches of different lengths, so that a mean over batches is not one over tokens."""
    return [random_ids(config, 2, 24, 1), random_ids(config, 3, 7, 2)]


def written(model: LanguageModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every layer adds to the residual stream, (tokens, D) each, in float64."""
    h, found = ops.embedding(ids, model.embedding, torch.float32), []
    for block in model.blocks:
        out, residual = block.forward(h, None, block.new_cache(len(h)))
        found.append(out.double().flatten(0, 1))
        h = residual + out
    return found


def means(checkpoint: Checkpoint, without: int | None = None) -> list[torch.Tensor]:
    """Mean output of every layer over the calibration ids; ``without``: with that layer's correction taken out."""
    tensors = dict(checkpoint.tensors)
    if without is not None:
        del tensors[f"layers.{without}.{OUTPUT_BIAS}"]
    model = LanguageModel(Checkpoint(checkpoint.config, tensors, checkpoint.recipe, checkpoint.site_tensors))
    with use_backend("ref"):
        parts = [written(model, ids) for ids in batches(checkpoint.config)]
    return [torch.cat(layer).mean(0) for layer in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["quamba-w8a8", "w4a16", None])
def test_the_bias_is_what_the_mean_has_lost(kind: str, base: str | None) -> None:
    """decay (mean_float - mean_quantized), every layer reading what the corrected layers before it give."""
    original, found = corrected(kind, base, 0.25)
    wanted = means(original)
    for layer in range(2):
        lost = wanted[layer] - means(found, without=layer)[layer]
        bias = found.tensors[f"layers.{layer}.{OUTPUT_BIAS}"]
        assert isinstance(bias, torch.Tensor) and bias.dtype == torch.float32
        torch.testing.assert_close(bias.double(), 0.25 * lost, rtol=1e-4, atol=1e-6)
        if base is None:
            assert float(bias.abs().max()) < 1e-6
        else:
            assert float(bias.abs().max()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_without_damping_the_means_are_the_float_models(kind: str) -> None:
    original, found = corrected(kind, "w4a16", 1.0)
    for ours, theirs in zip(means(found), means(original), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_a_bias_keeps_it(kind: str) -> None:
    original, found = corrected(kind, "w8a8", 1.0, projection_bias=True)
    for layer in range(2):
        name = f"layers.{layer}.{OUTPUT_BIAS}"
        assert 0 < float((found.tensors[name] - original.tensors[name]).abs().max()) < 0.1
    for ours, theirs in zip(means(found), means(original), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_changes(kind: str) -> None:
    """Scales and weights are those of the recipe without it, gptq's included; a decay of 0 is no correction."""
    _, found = corrected(kind, "quamba-w4a8", 0.0, d_model=128, d_inner=256)
    config = found.config
    plain_recipe = recipe_of(extends="quamba-w4a8", transforms=["hadamard"])
    plain = quantized(config, perturbed_tensors(config), plain_recipe, batches(config))
    assert set(found.tensors) - set(plain.tensors) == {f"layers.{layer}.{OUTPUT_BIAS}" for layer in (0, 1)}
    assert all(torch.equal(found.site_tensors[name], plain.site_tensors[name]) for name in plain.site_tensors)
    ids = random_ids(config, 2, 9, 4)
    with use_backend("ref"):
        assert torch.equal(LanguageModel(found)(ids), LanguageModel(plain)(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["quamba-w8a8", "w4a16"])
def test_every_way_to_run_it_adds_the_bias(kind: str, base: str, tmp_path: Path) -> None:
    """Integers, simulation, compiled token, and what was saved and read again; a bias large enough to be missed."""
    _, found = corrected(kind, base, 0.25)
    found.tensors = {**found.tensors, f"layers.0.{OUTPUT_BIAS}": torch.linspace(-0.5, 0.5, 32)}
    ids = random_ids(found.config, 2, 12, 3)
    with use_backend("ref"):
        logits = LanguageModel(found)(ids)
        assert torch.equal(LanguageModel(found, "simulate")(ids), logits)
        write_checkpoint(found, tmp_path / "out")
        assert torch.equal(LanguageModel(read_checkpoint(tmp_path / "out"))(ids), logits)
        without = LanguageModel(Checkpoint(found.config, {**found.tensors, f"layers.0.{OUTPUT_BIAS}": torch.zeros(32)},
                                           found.recipe, found.site_tensors))(ids)  # fmt: skip
    effect = float((without - logits).abs().mean())
    assert effect > 0.05
    model = Model(found)  # whose ties may fall otherwise, and whose products may take 16 bits
    assert float((model(ids) - logits).abs().mean()) < 0.02 * effect
    cache, reference = model.new_cache(2), model.new_cache(2)
    for t in range(3):
        with use_backend("ref"):
            expected = model.step(ids[:, t], reference)
        assert float((model.step(ids[:, t], cache) - expected).abs().mean()) < 0.02 * effect
    assert model._decoder is not None  # the compiled token took it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["w8a8", "w4a16"])
def test_the_gpu_kernels_add_it(kind: str, base: str) -> None:
    """A token and a prompt by the fused kernels, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    _, found = corrected(kind, base, 1.0, d_model=128, d_inner=256, vocab_size=64, **WIDE[kind])
    found.tensors = {**found.tensors, f"layers.0.{OUTPUT_BIAS}": torch.linspace(-0.5, 0.5, 128)}
    model = LanguageModel(found)
    ids = random_ids(found.config, 1, 6, 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = CapturedDecoder(model, 1, device, weights="float32")
    with use_backend("ref"):
        cache = model.new_cache(1)
        prompted, stepped = model.forward(ids, cache)[:, -1], model.step(ids[:, 0], cache)
    torch.testing.assert_close(decoder.prefill(ids.to(device)).cpu(), prompted, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(decoder.step(ids[:, 0].to(device)).cpu(), stepped, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_where_it_was(kind: str) -> None:
    config = config_of(kind)
    source, recipe = MemorySource(config, perturbed_tensors(config)), recipe_of(correct="mean", extends="quamba-w8a8")
    with use_backend("ref"):
        through = QuantizedParts(source, recipe, batches(config))
        made, states = [], []
        for number in range(through.count):
            made.append(through.make(number))
            states.append({name: h.clone() for name, h in through.streams().items()})
        again = QuantizedParts(source, recipe, batches(config))
        again.restore(2, states[1])
        resumed = again.make(2)
    name = f"layers.1.{OUTPUT_BIAS}"
    first, second = made[2][name], resumed[name]
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and torch.equal(first, second)


def test_a_missing_bias_is_noticed(tmp_path: Path) -> None:
    _, found = corrected("mamba2", "w4a16", 0.25)
    kept = {name: value for name, value in found.tensors.items() if name != f"layers.1.{OUTPUT_BIAS}"}
    write_checkpoint(Checkpoint(found.config, kept, found.recipe, found.site_tensors), tmp_path / "out")
    with pytest.raises(SquamataError, match="out_proj\\.bias' is missing"):
        read_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("correct", "words"),
    [
        ("meen", "no correction named 'meen' (did you mean 'mean'?)"),
        ({"mean": {"decy": 0.1}}, "no parameter 'decy' (did you mean 'decay'?)"),
        ({"mean": {"decay": 2.0}}, "decay"),
    ],
)
def test_what_the_checker_says(correct: Any, words: str) -> None:
    with pytest.raises(SquamataError) as caught:
        check_correction(recipe_of(correct=correct))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_scales_that_are_chosen_by_the_logits_come_too_late() -> None:
    recipe = recipe_of(extends="quamba-w8a8", correct="mean", tune={"lsq": {"against": "logits"}})
    with pytest.raises(SquamataError, match="leave one out"):
        check(recipe, config_of("mamba2"))
