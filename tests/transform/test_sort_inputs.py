"""Sorted inputs and kept channels, from the transform to the file: the right ones are kept, and it is worth while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

import squamata
from squamata.errors import SquamataError
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import observing
from squamata.models.lm import LanguageModel
from squamata.pipeline import quantize
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.recipe import Recipe
from squamata.text import read_documents

KEEP = {"channels": 8}
ROWS: dict[str, Any] = {"bits": 4, "granularity": "group(16)", "keep": KEEP}
TOKENS = ROWS | {"granularity": "token,group(16)", "dynamic": True}
SITES = ({"site": "*.mixer.in", "spec": TOKENS}, {"site": "*.mixer.out", "spec": TOKENS})
WEIGHTS = ({"site": "*.in_proj.weight", "spec": ROWS}, {"site": "*.out_proj.weight", "spec": ROWS})
SORTED = recipe_of(*SITES, *WEIGHTS, transforms=["sort_inputs"])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_the_channels_of_the_largest_squares_are_last(kind: str) -> None:
    config = config_of(kind)
    tensors, ids = perturbed_tensors(config), random_ids(config, 3, 40)
    checkpoint = quantized(config, tensors, SORTED, [ids])
    plain = quantized(config, tensors, Recipe.read("float"), [ids])
    model, squares = LanguageModel(plain, "float"), {}
    with observing(model.sites(), lambda site, x: squares.update({site.name: x.double().square().mean((0, 1))})):
        model(ids)
    for layer in range(2):
        for site, weight in (("in", "in_proj"), ("out", "out_proj")):
            order = checkpoint.site_tensors[f"layers.{layer}.mixer.{site}.order"]
            seen = squares[f"layers.{layer}.mixer.{site}"]
            assert bool((seen[order].diff() >= -1e-5 * seen.max()).all())
            stored = checkpoint.tensors[f"layers.{layer}.mixer.{weight}.weight"]
            assert isinstance(stored, QTensor) and stored.order is not None and torch.equal(stored.order, order)
            wrong = (stored.dequantize() - tensors[f"layers.{layer}.mixer.{weight}.weight"]).square().mean(0)[order]
            assert float(wrong[-8:].mean()) < float(wrong[:-8].mean()) / 20


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("rules", [SITES + WEIGHTS, SITES, WEIGHTS], ids=["both", "activations", "weights"])
@torch.no_grad()
def test_what_is_saved_is_read_bit_for_bit(kind: str, rules: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    """Also where one operand is float and the other is dequantized."""
    config = config_of(kind)
    recipe = recipe_of(*rules, transforms=["sort_inputs"], weights="gptq")
    checkpoint = quantized(config, perturbed_tensors(config), recipe, [random_ids(config, 2, 24)])
    write_checkpoint(checkpoint, tmp_path / "saved")
    again, ids = read_checkpoint(tmp_path / "saved"), random_ids(config, 2, 21, seed=5)
    logits = LanguageModel(checkpoint)(ids)
    assert torch.equal(LanguageModel(again)(ids), logits)
    assert torch.equal(LanguageModel(again, "simulate")(ids), logits)
    assert again.site_tensors.keys() == checkpoint.site_tensors.keys() and len(again.site_tensors) == 4


def test_an_order_that_is_none_is_refused(tmp_path: Path) -> None:
    config = config_of("mamba2")
    write_checkpoint(quantized(config, perturbed_tensors(config), SORTED, [random_ids(config, 2, 24)]), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "layers.1.mixer.out.order"
    safetensors.torch.save_file(tensors | {name: tensors[name].clamp_min(1)}, path)
    with pytest.raises(SquamataError, match=f"'{name}' does not hold every channel once"):
        read_checkpoint(tmp_path / "a")
    safetensors.torch.save_file({key: one for key, one in tensors.items() if key != name}, path)
    with pytest.raises(SquamataError, match=f"tensor '{name}' is missing"):
        read_checkpoint(tmp_path / "a")


def test_what_does_not_go_together_is_said_before_any_work(tmp_path: Path, bundled_folder: Path) -> None:
    for changed, said in (
        ({"transforms": ()}, "add the transform 'sort_inputs'"),
        (
            {"transforms": ["sort_inputs", "hadamard"]},
            "sort_inputs sorts channels as the model came: leave hadamard out",
        ),
        ({"transforms": ["sort_inputs"], "weights": "adaround"}, "adaround keeps no channels: use rtn or gptq"),
    ):
        with pytest.raises(SquamataError, match=said):
            quantize(bundled_folder, recipe_of(*SITES, *WEIGHTS, **changed), tmp_path / "out")


@torch.no_grad()
def test_on_a_trained_model_keeping_is_worth_its_bits(
    bundled_folder: Path, bundled_calibration: Path, tmp_path: Path
) -> None:
    """KL to the float model: Atom's is less than half of that of the same groups, nothing sorted and nothing kept."""
    naive = Recipe.read("atom-w4a4").to_mapping() | {"transforms": [], "name": "nothing-kept"}
    for rule in naive["rules"]:
        del rule["spec"]["keep"]
    exact = squamata.load(bundled_folder)
    text = read_documents(bundled_folder / "excerpt.jsonl")[0]
    ids = torch.tensor([exact.tokenizer.encode(text[:2000])[:192]])
    plain, found = exact(ids).log_softmax(-1), {}
    for recipe in (Recipe.read("atom-w4a4"), Recipe.from_mapping(naive)):
        out = tmp_path / recipe.name
        quantize(bundled_folder, recipe, out, calibration=bundled_calibration, samples=8, length=128)
        found[recipe.name] = float((plain.exp() * (plain - squamata.load(out)(ids).log_softmax(-1))).sum(-1).mean())
    assert 0 < found["atom-w4a4"] < found["nothing-kept"] / 2, found
