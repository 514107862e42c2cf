"""What a model refuses, and what its caches are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import config_of, float_model, perturbed_tensors

from squamata.errors import SquamataError
from squamata.load.layouts import normalise
from squamata.models.block import ScanCache
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.spec.recipe import Recipe

SIZES = ["d_model", "vocab_size", "d_inner", "d_state", "d_conv", "n_groups", "chunk_size", "head_dim"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, -1, -64, 2**40])
def test_sizes_that_no_model_has_are_refused(size: str, value: int) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of("mamba2", **{size: value})
    (problem,) = caught.value.errors()
    assert size in (*problem["loc"], *problem["msg"].split())


@pytest.mark.parametrize("change", [{"dt_rank": 0}, {"dt_rank": -3}, {"norm_epsilon": 0.0}, {"norm_epsilon": -1e-5}])
def test_ranks_and_epsilons_are_positive(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        config_of("mamba1", **change)


@pytest.mark.parametrize("change", [{"n_groups": 0}, {"num_heads": 0}, {"state_size": -1}, {"expand": 0.001}])
def test_foreign_sizes_are_one_line(change: dict[str, Any]) -> None:
    foreign = {"architectures": ["Mamba2ForCausalLM"], "hidden_size": 32, "num_heads": 4, "head_dim": 16}
    with pytest.raises(SquamataError) as caught:
        normalise(foreign | {"n_groups": 1} | change, "config.json")
    assert "\n" not in str(caught.value)


def test_an_unknown_mode_names_the_nearest() -> None:
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    with pytest.raises(SquamataError, match=r"no mode named 'simulated' .*'simulate'"):
        LanguageModel(Checkpoint(config, tensors, Recipe.read("float")), "simulated")  # type: ignore[arg-type]
    model = float_model(config, tensors)
    with pytest.raises(SquamataError, match=r"no mode named 'Float' .*'float'"):
        model.set_mode("Float")  # type: ignore[arg-type]
    assert {site.mode for site in model.sites()} == {"float"}


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_cache_says_how_large_it_is(kind: str) -> None:
    config = config_of(kind)
    cache = float_model(config, perturbed_tensors(config)).new_cache(3)
    channels = config.d_inner if kind == "mamba1" else config.d_inner + 2 * config.n_groups * config.d_state
    for layer in cache:
        assert isinstance(layer, ScanCache)
        kept = layer.conv.nbytes // (3 * channels * 4)
        assert kept in (config.d_conv - 1, config.d_conv)
        assert layer.nbytes == layer.conv.nbytes + 3 * config.d_inner * config.d_state * 4


def test_a_rotation_must_fit_the_block() -> None:
    config = config_of("mamba1")
    for tensor in (torch.tensor([64, 12]), torch.tensor([64]), torch.tensor(64), torch.tensor([64.0, 64.0])):
        tensors = perturbed_tensors(config) | {"layers.0.mixer.rotation": tensor}
        with pytest.raises(SquamataError, match=r"mixer\.rotation"):
            float_model(config, tensors)
    right = perturbed_tensors(config) | {"layers.0.mixer.rotation": torch.tensor([64, 32])}
    assert float_model(config, right).blocks[0].rotation() is not None
