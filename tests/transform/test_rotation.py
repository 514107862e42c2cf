"""A transform gives an equal model: float64 logits do not move, also after save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.recipe import Recipe
from squamata.transform import apply, check

ROTATED = recipe_of(transforms=["hadamard"])
WIDTHS = {"2^k": 64, "12*2^k": 96, "20*2^k": 80, "28*2^k": 112, "40*2^k": 160, "no-matrix": 72}


def wide(kind: str, width: int) -> ModelConfig:
    heads: dict[str, Any] = {"head_dim": 8, "n_groups": 1} if kind == "mamba2" else {}
    return config_of(kind, d_inner=width, d_model=24, **heads)


def rotate_all(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rotated = dict(tensors)
    for layer, kind in enumerate(config.blocks):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        rotated |= {prefix + name: tensor for name, tensor in apply(ROTATED, config, kind, own, {}).items()}
    return rotated


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("width", list(WIDTHS.values()), ids=list(WIDTHS))
@torch.no_grad()
def test_hadamard_leaves_the_logits(kind: str, width: int) -> None:
    config = wide(kind, width)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 2, 19)
    rotated = rotate_all(config, tensors)
    name = "layers.0.mixer.out_proj.weight"
    assert not torch.allclose(rotated[name], tensors[name])
    before = float_model(config, tensors, torch.float64)(ids)
    after = float_model(config, rotated, torch.float64)(ids)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("width", list(WIDTHS.values()), ids=list(WIDTHS))
@torch.no_grad()
def test_a_rotation_survives_save_and_load(kind: str, width: int, tmp_path: Path) -> None:
    config = wide(kind, width)
    checkpoint = quantized(config, perturbed_tensors(config), ROTATED, [])
    write_checkpoint(checkpoint, tmp_path / "saved")
    ids = random_ids(config, 1, 12)
    loaded = LanguageModel(read_checkpoint(tmp_path / "saved"), "float")
    assert torch.equal(loaded(ids), LanguageModel(checkpoint, "float")(ids))
    assert all(block.out_rotation is not None and block.out_rotation.size == width for block in loaded.blocks)
    torch.testing.assert_close(loaded(ids), float_model(config, perturbed_tensors(config))(ids), rtol=1e-3, atol=1e-4)


def test_the_given_tensors_are_not_changed() -> None:
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    rotate_all(config, tensors)
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[name], before[name]) for name in before)


@torch.no_grad()
def test_rotation_lowers_the_error_of_an_outlier() -> None:
    """What it is for: one channel of y a hundred times the others, 8 bits per tensor at `out`."""
    config = config_of("mamba1", blocks=("mamba1",))
    tensors = perturbed_tensors(config)
    tensors["layers.0.mixer.D"][5] = 100.0
    ids = random_ids(config, 4, 40)
    rule = {"site": "*.mixer.out", "spec": {"bits": 8}}
    plain = float_model(config, tensors)(ids)
    errors = []
    for transforms in ([], ["hadamard"]):
        recipe = recipe_of(rule, transforms=transforms)
        with use_backend("ref"):
            logits = LanguageModel(quantized(config, tensors, recipe, [ids]))(ids)
        errors.append(float((logits - plain).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_unknown_transforms_and_parameters_are_named() -> None:
    with pytest.raises(SquamataError, match="did you mean 'hadamard'"):
        check(recipe_of(transforms=["hadamrd"]))
    with pytest.raises(SquamataError, match="no parameter 'sites'"):
        check(recipe_of(transforms=[{"hadamard": {"sites": ["out"]}}]))


def test_a_layer_without_an_output_projection_stays() -> None:
    config = config_of("mamba2")
    tensors = {"norm.weight": torch.ones(config.d_model)}
    assert apply(ROTATED, config, "another", tensors, {}) == tensors


def test_a_float_checkpoint_has_no_rotation() -> None:
    config = config_of("mamba2")
    checkpoint = Checkpoint(config, perturbed_tensors(config), Recipe.read("float"))
    assert all(block.out_rotation is None for block in LanguageModel(checkpoint).blocks)
