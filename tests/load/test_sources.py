"""Foreign checkpoints arrive under our names, tensor for tensor, in both layouts and every file form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_writers import (
    REAL_MODELS,
    distinct_tensors,
    foreign_tensors,
    state_spaces_config,
    tiny_config,
    write_files,
    write_hugging_face,
    write_state_spaces,
)
from safetensors.torch import load_file, save_file
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from squamata.load.hub import bundled, resolve
from squamata.load.layouts import foreign_name, normalise
from squamata.load.random_model import random_tensors
from squamata.load.source import is_squamata_checkpoint, open_source
from squamata.models.config import SHAPES, ModelConfig, parameter_shapes

VARIANTS = {
    "mamba1": tiny_config("mamba1"),
    "mamba1-biased-untied": tiny_config("mamba1", projection_bias=True, conv_bias=False, tie_embeddings=False),
    "mamba2": tiny_config("mamba2"),
    "mamba2-biased-untied-limited": tiny_config(
        "mamba2", projection_bias=True, conv_bias=False, tie_embeddings=False, time_step_limit=(0.01, 0.5), n_groups=1
    ),
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("writer", [write_state_spaces, write_hugging_face])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path: Path, variant: str, writer: Any, sharded: bool, binary: bool) -> None:
    config = VARIANTS[variant]
    tensors = distinct_tensors(config, dtype=torch.bfloat16)
    writer(tmp_path, config, tensors, sharded=sharded, binary=binary)
    source = open_source(tmp_path)
    assert source.config == config
    assert source.names() == list(tensors)
    assert_same(source.tensors(), tensors)


def test_dtypes_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    config = tiny_config("mamba2")
    tensors = random_tensors(config, dtype=torch.float16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.float32}
    write_state_spaces(tmp_path, config, tensors, sharded=True)
    assert_same(open_source(tmp_path).tensors(), tensors)


def test_one_layer_is_read_without_the_other_shards(tmp_path: Path) -> None:
    config = tiny_config("mamba1", blocks=("mamba1",) * 6)
    tensors = distinct_tensors(config)
    write_state_spaces(tmp_path, config, tensors, sharded=True)
    source = open_source(tmp_path)
    for shard in (1, 3):
        (tmp_path / f"model-{shard:05d}-of-00003.safetensors").unlink()
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.3.")}
    assert_same(source.tensors("layers.3."), layer)


def test_a_prefix_does_not_match_longer_layer_numbers(tmp_path: Path) -> None:
    config = tiny_config("mamba1", blocks=("mamba1",) * 11)
    write_state_spaces(tmp_path, config, distinct_tensors(config))
    assert all(name.startswith("layers.1.") for name in open_source(tmp_path).tensors("layers.1."))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stored_copy_of_a_tied_head_is_left_out(tmp_path: Path, sharded: bool) -> None:
    config = tiny_config("mamba1")
    tensors = distinct_tensors(config)
    foreign = foreign_tensors(tensors, "embedding", first=True)
    foreign["lm_head.weight"] = foreign["backbone.embedding.weight"].clone()
    write_files(tmp_path, state_spaces_config(config), foreign, sharded=sharded, binary=False)
    source = open_source(tmp_path)
    assert source.config == config
    assert_same(source.tensors(), tensors)


def test_a_head_that_differs_unties_the_model(tmp_path: Path) -> None:
    tied = tiny_config("mamba2")
    config = tied.model_copy(update={"tie_embeddings": False})
    tensors = distinct_tensors(config)
    foreign = foreign_tensors(tensors, "embedding", first=False)
    write_files(tmp_path, state_spaces_config(tied), foreign, sharded=False, binary=False)
    source = open_source(tmp_path)
    assert source.config == config
    assert_same(source.tensors(), tensors)


def test_an_old_bin_without_zip_is_read_too(tmp_path: Path) -> None:
    config = tiny_config("mamba1")
    tensors = distinct_tensors(config)
    write_state_spaces(tmp_path, config, tensors, binary=True)
    foreign = foreign_tensors(tensors, "embedding", first=True)
    torch.save(foreign, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(open_source(tmp_path).tensors(), tensors)


def test_hugging_face_files_may_use_the_other_name_of_the_embedding(tmp_path: Path) -> None:
    config = tiny_config("mamba2")
    tensors = distinct_tensors(config)
    write_hugging_face(tmp_path, config, tensors)
    save_file(foreign_tensors(tensors, "embedding", first=False), tmp_path / "model.safetensors")
    assert_same(open_source(tmp_path).tensors(), tensors)


def test_safetensors_win_over_a_bin_beside_them(tmp_path: Path) -> None:
    config = tiny_config("mamba1")
    write_state_spaces(tmp_path, config, distinct_tensors(config, seed=1), binary=True)
    tensors = distinct_tensors(config, seed=2)
    write_state_spaces(tmp_path, config, tensors)
    assert_same(open_source(tmp_path).tensors(), tensors)


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 6}
HUGGING_FACE = {
    "mamba": (MambaForCausalLM, MambaConfig(**SMALL)),
    "mamba-untied-biased": (
        MambaForCausalLM,
        MambaConfig(**SMALL, tie_word_embeddings=False, use_bias=True, time_step_rank=7, expand=3, conv_kernel=3),
    ),
    "falcon": (FalconMambaForCausalLM, FalconMambaConfig(**SMALL, mixer_rms_eps=3e-6, tie_word_embeddings=False)),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config(**SMALL, num_heads=8, head_dim=8, n_groups=2)),
    "mamba2-tied-limited": (
        Mamba2ForCausalLM,
        Mamba2Config(
            **SMALL,
            num_heads=4,
            head_dim=16,
            n_groups=4,
            tie_word_embeddings=True,
            use_conv_bias=False,
            time_step_limit=(0.02, 0.4),
            layer_norm_epsilon=2e-4,
            chunk_size=64,
        ),
    ),
}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_models_saved_by_transformers(tmp_path: Path, name: str, shard_size: str) -> None:
    kind, theirs = HUGGING_FACE[name]
    model = kind(theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")

    source = open_source(tmp_path)
    state = model.state_dict()
    if theirs.tie_word_embeddings:
        del state["lm_head.weight"]
    found = foreign_tensors(source.tensors(), "embeddings", first="mamba2" not in name)
    assert found.keys() == state.keys()
    for tensor_name, tensor in state.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name
    assert_config_is_theirs(source.config, model)


def assert_config_is_theirs(config: ModelConfig, model: Any) -> None:
    """What the forward pass will use, against the attributes that the Hugging Face modules use."""
    mixer = model.backbone.layers[0].mixer
    assert config.n_layers == len(model.backbone.layers)
    assert config.tie_embeddings == (model.lm_head.weight is model.backbone.embeddings.weight)
    assert config.norm_epsilon == model.backbone.norm_f.variance_epsilon
    assert (config.d_inner, config.d_state) == (mixer.intermediate_size, mixer.ssm_state_size)
    if config.architecture == "mamba1":
        assert config.dt_rank == mixer.time_step_rank
        assert config.bcdt_norm_epsilon == getattr(mixer, "rms_eps", None)
    else:
        assert (config.n_heads, config.head_dim, config.n_groups) == (mixer.num_heads, mixer.head_dim, mixer.n_groups)
        assert config.time_step_limit == tuple(mixer.time_step_limit)
        assert config.gate_norm_epsilon == mixer.norm.variance_epsilon
        assert config.chunk_size == mixer.chunk_size


@pytest.mark.parametrize("folder", REAL_MODELS, ids=lambda folder: folder.name)
def test_real_models(folder: Path) -> None:
    source = open_source(folder)
    stored = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    tensors = source.tensors()
    found = foreign_tensors(tensors, "embedding", first=source.config.architecture == "mamba1")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert source.config.d_inner == 2 * source.config.d_model
    assert source.config.architecture == folder.name.split("-")[0]
    layers = {name for layer in range(source.config.n_layers) for name in source.tensors(f"layers.{layer}.")}
    assert layers == {name for name in tensors if name.startswith("layers.")}


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "mamba2-8b"])
def test_published_state_spaces_configs(shape: str) -> None:
    second = shape.startswith("mamba2")
    published = {
        "d_model": SHAPES[shape].d_model,
        "n_layer": SHAPES[shape].n_layers,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"} if second else {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16 if second else 8,
    }
    published |= {"attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0, "tie_embeddings": True} if second else {}
    assert normalise(published, "config.json") == SHAPES[shape]


def test_published_hugging_face_config_that_also_has_state_spaces_keys() -> None:
    published = {
        "architectures": ["MambaForCausalLM"],
        "conv_kernel": 4,
        "d_inner": 1536,
        "d_model": 768,
        "expand": 2,
        "hidden_act": "silu",
        "hidden_size": 768,
        "intermediate_size": 1536,
        "layer_norm_epsilon": 1e-05,
        "model_type": "mamba",
        "n_layer": 24,
        "num_hidden_layers": 24,
        "pad_vocab_size_multiple": 8,
        "ssm_cfg": {},
        "state_size": 16,
        "time_step_rank": 48,
        "vocab_size": 50280,
    }
    assert normalise(published, "config.json") == SHAPES["mamba-130m"]


def test_intermediate_size_beats_expand_as_in_falcon_mamba_7b() -> None:
    published = {
        "architectures": ["FalconMambaForCausalLM"],
        "hidden_size": 4096,
        "expand": 16,
        "intermediate_size": 8192,
        "num_hidden_layers": 64,
        "state_size": 16,
        "time_step_rank": 256,
        "vocab_size": 65024,
        "tie_word_embeddings": False,
    }
    config = normalise(published, "config.json")
    assert (config.d_inner, config.bcdt_norm_epsilon) == (8192, 1e-6)
    for file_form in ({"mixer_rms_eps": 1e-5}, {"model_type": "falcon_mamba", "mixer_rms_eps": 1e-5}):
        assert normalise(published | file_form, "config.json").bcdt_norm_epsilon == 1e-5


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_random_tensors(kind: str) -> None:
    config = tiny_config(kind, d_inner=480, tie_embeddings=False)
    tensors = random_tensors(config, seed=3)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_shapes(config)
    again = random_tensors(config, seed=3, prefix="layers.1.")
    assert again and all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())
    other = random_tensors(config, seed=4)
    drawn = ("embedding.weight", "in_proj.weight", "out_proj.weight", "conv.weight", "conv.bias", "dt_bias")
    assert all(not torch.equal(tensor, other[name]) for name, tensor in tensors.items() if name.endswith(drawn))
    assert not torch.equal(tensors["layers.0.mixer.in_proj.weight"], tensors["layers.1.mixer.in_proj.weight"])

    dt = torch.nn.functional.softplus(tensors["layers.0.mixer.dt_bias"].double())
    assert dt.min() >= 0.001 * (1 - 1e-4) and dt.max() <= 0.1 * (1 + 1e-4) and dt.max() / dt.min() > 3
    decay = tensors["layers.0.mixer.A_log"].exp()
    assert decay.min() >= 0.999 and decay.max() <= 16.001
    if kind == "mamba1":
        torch.testing.assert_close(decay[7], torch.arange(1.0, 11.0))
    rows = tensors["layers.0.mixer.out_proj.weight"].std().item()
    assert math.isclose(rows, 480**-0.5, rel_tol=0.05)


def test_squamata_checkpoints_are_told_apart(tmp_path: Path) -> None:
    assert not is_squamata_checkpoint(tmp_path)
    assert not is_squamata_checkpoint(bundled())
    (tmp_path / "config.json").write_text(json.dumps({"squamata_format": 1}))
    assert is_squamata_checkpoint(tmp_path)


def test_local_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    forms = ("owner/name", "./owner/name", "owner/name/", "~/owner/name", str(folder), Path("owner/name"))
    for form in forms:
        assert resolve(form).resolve() == folder.resolve()
    assert resolve("bundled") == bundled()
    (tmp_path / "bundled").mkdir()
    assert resolve("bundled").resolve() == (tmp_path / "bundled").resolve()


def test_bundled_text_is_disjoint_attributed_and_small() -> None:
    titles = {}
    for name, limit in (("excerpt", 120_000), ("calibration", 150_000)):
        file = bundled() / f"{name}.jsonl"
        assert file.stat().st_size <= limit
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert all(row["text"].startswith(row["title"] + "\n") for row in rows)
        titles[name] = {row["title"] for row in rows}
    assert len(titles["excerpt"]) == 8 and len(titles["calibration"]) == 12
    assert not titles["excerpt"] & titles["calibration"]
    attribution = (bundled() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(
        f"[{title}](https://en.wikipedia.org/" in attribution for title in titles["excerpt"] | titles["calibration"]
    )
    assert "creativecommons.org/licenses/by-sa/3.0" in attribution


def test_names_inside_a_layer_go_by_its_own_kind() -> None:
    """Also in a model of both kinds, which no foreign configuration describes yet."""
    config = tiny_config("mamba1", blocks=("mamba1", "mamba2"), head_dim=8)
    names = [foreign_name(name, config, ()) for name in parameter_shapes(config)]
    assert "backbone.layers.0.mixer.dt_proj.bias" in names and "backbone.layers.1.mixer.dt_bias" in names
    assert "backbone.layers.1.mixer.norm.weight" in names and "backbone.layers.0.mixer.norm.weight" not in names
    assert "backbone.layers.0.norm.weight" in names and "backbone.norm_f.weight" in names
    assert len(set(names)) == len(names)
