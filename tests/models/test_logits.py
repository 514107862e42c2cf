"""Logits against Hugging Face's implementation, a plain float64 recurrence, and the model's own other paths."""

from __future__ import annotations

from pathlib import Path

import plain_recurrence
import pytest
import torch
from judged import model_folders
from layout_writers import foreign_tensors
from tiny import config_of, float_model, perturbed_tensors, random_ids
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from squamata.kernels.dispatch import use_backend
from squamata.load.source import open_source
from squamata.models.config import ModelConfig

INFINITE = float("inf")
MAMBA1 = {
    "small": ({}, 7),
    "one-token": ({"d_state": 32}, 1),
    "biased": ({"projection_bias": True, "d_state": 64}, 63),
    "no-conv-bias": ({"conv_bias": False, "dt_rank": 8, "norm_epsilon": 1e-3}, 130),
    "wide-state": ({"d_state": 128, "dt_rank": 1}, 17),
    "odd-width": ({"d_model": 37, "d_inner": 74, "dt_rank": 5}, 33),
    "untied": ({"tie_embeddings": False, "d_conv": 3}, 64),
    "three-layers": ({"blocks": ("mamba1",) * 3, "d_model": 48, "d_inner": 96, "dt_rank": 3, "d_conv": 2}, 40),
    "rank-above-16": ({"d_model": 64, "d_inner": 128, "dt_rank": 20, "projection_bias": True, "conv_bias": False}, 9),
}
FALCON = {
    "small": ({"bcdt_norm_epsilon": 1e-6}, 7),
    "one-token": ({"bcdt_norm_epsilon": 1e-3, "d_state": 32}, 1),
    "biased-untied": ({"bcdt_norm_epsilon": 1e-5, "projection_bias": True, "tie_embeddings": False}, 65),
}
MAMBA2 = {
    "small": ({}, 7),
    "one-token": ({"n_groups": 1, "d_state": 64}, 1),
    "head-32-groups-8": ({"d_model": 128, "d_inner": 256, "head_dim": 32, "n_groups": 8, "d_state": 32}, 63),
    "head-64-state-128": ({"d_model": 64, "d_inner": 128, "head_dim": 64, "n_groups": 1, "d_state": 128}, 130),
    "head-128": ({"d_model": 128, "d_inner": 256, "head_dim": 128, "n_groups": 2, "chunk_size": 64}, 130),
    "limited-dt": ({"time_step_limit": (0.02, 0.09), "chunk_size": 16}, 50),
    "biased-untied": ({"projection_bias": True, "tie_embeddings": False, "chunk_size": 32}, 33),
    "no-conv-bias": ({"conv_bias": False, "n_groups": 4, "norm_epsilon": 1e-3, "gate_norm_epsilon": 1e-3}, 9),
    "chunk-of-7": ({"chunk_size": 7, "d_conv": 3, "blocks": ("mamba2",) * 3}, 22),
    "two-tokens": ({"chunk_size": 256, "d_state": 20}, 2),
}
EVERY = [pytest.param("mamba1", *case, id=f"mamba1-{name}") for name, case in MAMBA1.items()]
EVERY += [pytest.param("mamba1", *case, id=f"falcon-{name}") for name, case in FALCON.items()]
EVERY += [pytest.param("mamba2", *case, id=f"mamba2-{name}") for name, case in MAMBA2.items()]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def hugging_face(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' own model with our tensors in it; every tensor must find its place."""
    shared = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.d_inner // config.d_model,
        "use_bias": config.projection_bias,
        "use_conv_bias": config.conv_bias,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": False,
    }
    first = config.architecture == "mamba1"
    if first and config.bcdt_norm_epsilon is not None:
        theirs = FalconMambaConfig(**shared, time_step_rank=config.dt_rank, mixer_rms_eps=config.bcdt_norm_epsilon)
        model: torch.nn.Module = FalconMambaForCausalLM(theirs)
    elif first:
        model = MambaForCausalLM(MambaConfig(**shared, time_step_rank=config.dt_rank))
    else:
        heads = {"num_heads": config.n_heads, "head_dim": config.head_dim, "n_groups": config.n_groups}
        limits = {"chunk_size": config.chunk_size, "time_step_limit": config.time_step_limit}
        model = Mamba2ForCausalLM(Mamba2Config(**shared, **heads, **limits))
    foreign = foreign_tensors(tensors, "embeddings", first)
    missing, unexpected = model.load_state_dict(foreign, strict=False)
    assert (set(missing) <= {"lm_head.weight"} if config.tie_embeddings else not missing) and not unexpected
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize(("kind", "overrides", "length"), EVERY)
@torch.no_grad()
def test_float32_equals_hugging_face(kind: str, overrides: dict, length: int) -> None:
    config = config_of(kind, **overrides)
    tensors = perturbed_tensors(config, seed=length)
    ids = random_ids(config, 2, length)
    ours = float_model(config, tensors)(ids)
    assert ours.dtype == torch.float32
    assert relative_error(ours, hugging_face(config, tensors)(ids).logits) <= 1e-5


@pytest.mark.parametrize(("kind", "overrides", "length"), EVERY)
@torch.no_grad()
def test_float64_equals_the_plain_recurrence(kind: str, overrides: dict, length: int) -> None:
    config = config_of(kind, **overrides)
    tensors = perturbed_tensors(config, seed=length, dtype=torch.float64)
    ids = random_ids(config, 2, length)
    ours = float_model(config, tensors, torch.float64)(ids)
    plain = {name: tensor.numpy() for name, tensor in tensors.items()}
    for row, sequence in zip(ours, ids.tolist(), strict=True):
        theirs = torch.from_numpy(plain_recurrence.logits(config, plain, sequence))
        assert relative_error(row, theirs) <= 1e-10


@pytest.mark.parametrize(("kind", "overrides", "length"), EVERY)
@torch.no_grad()
def test_pieces_of_any_size_equal_one_forward(kind: str, overrides: dict, length: int) -> None:
    """Prefill and steps, and prefill from a state, in float64 so that only a real difference can show."""
    config = config_of(kind, **overrides)
    model = float_model(config, perturbed_tensors(config, seed=length, dtype=torch.float64), torch.float64)
    ids = random_ids(config, 3, length + 20)
    whole = model(ids)
    for sizes in ([length, *[1] * 20], [5, length, 15], [length + 19, 1], [2] * (length // 2 + 10)):
        cache, parts, start = model.new_cache(batch=3), [], 0
        for size in sizes:
            piece = ids[:, start : start + size]
            parts.append(model.step(piece[:, 0], cache)[:, None] if size == 1 else model.forward(piece, cache))
            start += size
        assert relative_error(torch.cat(parts, 1), whole[:, :start]) <= 1e-11


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(kind: str) -> None:
    config = config_of(kind)
    model = float_model(config, perturbed_tensors(config, dtype=torch.float64), torch.float64)
    ids = random_ids(config, 3, 12)
    together = model(ids)
    for row in range(3):
        assert relative_error(model(ids[row : row + 1])[0], together[row]) <= 1e-12


@torch.no_grad()
def test_last_only_gives_the_last_logits() -> None:
    config = config_of("mamba2")
    model = float_model(config, perturbed_tensors(config))
    ids = random_ids(config, 2, 9)
    last = model.forward(ids, model.new_cache(2), last_only=True)
    assert last.shape == (2, 1, config.vocab_size)
    torch.testing.assert_close(last[:, 0], model(ids)[:, -1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_cache_does_not_grow_and_a_call_leaves_no_trace() -> None:
    config = config_of("mamba1")
    model = float_model(config, perturbed_tensors(config))
    cache = model.new_cache(2)
    before = [(layer.conv.shape, layer.state.shape, layer.nbytes) for layer in cache]
    model.forward(random_ids(config, 2, 50), cache)
    assert [(layer.conv.shape, layer.state.shape, layer.nbytes) for layer in cache] == before
    ids = random_ids(config, 2, 5)
    assert torch.equal(model(ids), model(ids))


@torch.no_grad()
def test_hybrid_of_both_kinds_is_the_same_code() -> None:
    config = config_of("mamba1", blocks=("mamba1", "mamba2", "mamba1"), head_dim=16, n_groups=2)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 1, 23)
    ours = float_model(config, tensors, torch.float64)(ids)[0]
    plain = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert relative_error(ours, torch.from_numpy(plain_recurrence.logits(config, plain, ids[0].tolist()))) <= 1e-10


def _mark(folder: Path) -> object:
    return pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] if "24m" in folder.name else [])


@pytest.mark.parametrize("folder", [_mark(folder) for folder in model_folders()])
@torch.no_grad()
def test_real_models_equal_hugging_face_and_their_own_steps(folder: Path) -> None:
    source = open_source(folder)
    tensors = {name: tensor.float() for name, tensor in source.tensors().items()}
    ids = torch.cat([torch.zeros(1, 1, dtype=torch.long), random_ids(source.config, 1, 47)], 1)
    with use_backend("ref"):
        model = float_model(source.config, tensors)
        ours = model(ids)
        cache = model.new_cache()
        stepped = [model.forward(ids[:, :40], cache), *(model.step(ids[:, t], cache)[:, None] for t in range(40, 48))]
    assert relative_error(ours, hugging_face(source.config, tensors)(ids).logits) <= 1e-5
    assert relative_error(torch.cat(stepped, 1), ours) <= 1e-5
