"""Folding norms and rotating the residual stream leave the function alone: float64 logits, alone and composed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import MemorySource, config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.hadamard import Rotation
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts

WIDTHS = {"2^k": 32, "12*2^k": 48, "20*2^k": 80, "28*2^k": 56, "40*2^k": 160, "no-matrix": 36}
COMPOSITIONS = [
    ["fold_norm"],
    ["fold_norm", "rotate_residual"],
    ["fold_norm", "rotate_residual", "hadamard"],
    ["hadamard", "fold_norm", "rotate_residual"],
]


def model_of(kind: str, d_model: int, **overrides: Any) -> ModelConfig:
    heads: dict[str, Any] = {"head_dim": 8, "n_groups": 2} if kind == "mamba2" else {}
    return config_of(kind, d_model=d_model, d_inner=2 * d_model - 2 * d_model % 16, **heads | overrides)


def transformed(config: ModelConfig, tensors: dict[str, torch.Tensor], transforms: list[str]) -> Checkpoint:
    parts = QuantizedParts(MemorySource(config, tensors), recipe_of(transforms=transforms), [])
    merged = {name: value for part in parts.each() for name, value in part.items()}
    return Checkpoint(parts.config, merged, recipe_of(transforms=transforms))


@pytest.mark.parametrize("transforms", COMPOSITIONS, ids="+".join)
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("width", list(WIDTHS.values()), ids=list(WIDTHS))
@torch.no_grad()
def test_the_logits_stay(kind: str, width: int, transforms: list[str]) -> None:
    config = model_of(kind, width, projection_bias=True, tie_embeddings=width == 32)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 2, 19)
    before = float_model(config, tensors, torch.float64)(ids)
    after = LanguageModel(transformed(config, tensors, transforms), "float", torch.float64)(ids)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9


@torch.no_grad()
def test_the_stream_itself_is_rotated() -> None:
    """Not the function alone: what the second layer reads is the first model's stream times the Hadamard matrix."""
    config = model_of("mamba2", 48)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    rotated = transformed(config, tensors, ["fold_norm", "rotate_residual"])
    ids = random_ids(config, 1, 11)
    streams = []
    for model in (float_model(config, tensors, torch.float64), LanguageModel(rotated, "float", torch.float64)):
        cache = model.new_cache(1)
        h, residual = model.blocks[0].forward(model.embedding[ids], None, cache[0])  # type: ignore[index]
        streams.append(h + residual)
    from squamata.kernels.hadamard.matrices import hadamard_matrix

    assert Rotation.of_size(48).block == 48
    expected = streams[0] @ hadamard_matrix(48).double().T / 48**0.5
    torch.testing.assert_close(streams[1], expected, rtol=1e-9, atol=1e-9)


def test_a_tied_head_is_untied_by_folding_and_only_by_that() -> None:
    config = model_of("mamba1", 32)
    tensors = perturbed_tensors(config)
    assert config.tie_embeddings
    assert "head.weight" not in transformed(config, tensors, ["hadamard"]).tensors
    folded = transformed(config, tensors, ["fold_norm"])
    assert not folded.config.tie_embeddings
    torch.testing.assert_close(
        folded.tensors["head.weight"], tensors["embedding.weight"] * tensors["final_norm.weight"]
    )
    assert torch.equal(folded.tensors["embedding.weight"], tensors["embedding.weight"])  # type: ignore[arg-type]


def test_rotating_before_folding_is_refused() -> None:
    config = model_of("mamba1", 32)
    with pytest.raises(SquamataError, match="put fold_norm before it"):
        transformed(config, perturbed_tensors(config), ["rotate_residual"])


@torch.no_grad()
def test_what_it_is_for() -> None:
    """One channel of the stream fifty times the others: eight bits per tensor at `in` lose less after a rotation."""
    config = model_of("mamba2", 32)
    tensors = perturbed_tensors(config)
    tensors["embedding.weight"][:, 3] *= 50
    ids = random_ids(config, 4, 40)
    plain = float_model(config, tensors)(ids)
    errors = []
    for transforms in ([], ["fold_norm", "rotate_residual"]):
        recipe = recipe_of({"site": "*.mixer.in", "spec": {"bits": 8}}, transforms=transforms)
        logits = LanguageModel(quantized(config, tensors, recipe, [ids]), "simulate")(ids)
        errors.append(float((logits - plain).norm()))
    assert errors[1] < 0.5 * errors[0]
