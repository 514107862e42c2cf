"""FalconMamba and Codestral as published: their configurations, and files of transformers in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from squamata.errors import SquamataError
from squamata.load.layouts import normalise
from squamata.load.source import open_source
from squamata.pipeline import load, quantize

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 16}
MODELS = {
    "falcon-mamba": (
        FalconMambaForCausalLM,
        FalconMambaConfig(**SMALL, intermediate_size=128, expand=16, time_step_rank=4, tie_word_embeddings=False),
    ),
    "codestral": (
        Mamba2ForCausalLM,
        Mamba2Config(**SMALL, num_heads=16, head_dim=8, n_groups=8, norm_before_gate=True, tie_word_embeddings=False),
    ),
}


@pytest.fixture(params=[(name, size) for name in MODELS for size in ("1GB", "30KB")], ids=lambda p: "-".join(p))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A folder in bfloat16, single or sharded, and the model that transformers makes of it in float32."""
    name, shard_size = request.param
    kind, config = MODELS[name]
    torch.manual_seed(len(name))
    model = kind(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "norm_f.weight", ".D", "bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embeddings" in key:
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "30KB")
    return tmp_path, kind.from_pretrained(tmp_path, dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_are_those_of_transformers(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, theirs = saved
    source = open_source(folder)
    assert {tensor.dtype for tensor in source.tensors().values()} == {torch.bfloat16}
    model = load(folder)
    ids = torch.randint(96, (2, 21), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids, use_cache=False).logits
    assert float((model(ids) - expected).abs().max() / expected.abs().max()) <= 1e-5
    cache = model.new_cache(1)
    steps = torch.stack([model.step(token[None], cache)[0] for token in ids[0]])
    assert float((steps - expected[0]).abs().max() / expected.abs().max()) <= 1e-4


def test_they_can_be_quantized(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    folder, _ = saved
    quantize(folder, "w4a16", tmp_path / "out")
    ids = torch.arange(12)[None]
    assert torch.isfinite(load(tmp_path / "out")(ids)).all()


def test_the_published_configuration_of_codestral() -> None:
    published = json.loads(
        """{"architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 4096, "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 8,
        "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64, "rescale_prenorm_residual": false,
        "residual_in_fp32": true, "rms_norm": true, "state_size": 128, "tie_word_embeddings": false,
        "time_step_floor": 0.0001, "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 256, "torch_dtype": "bfloat16", "use_bias": false, "use_conv_bias": true,
        "vocab_size": 32768}"""
    )
    config = normalise(published, "config.json")
    assert (config.d_model, config.d_inner, config.n_heads, config.n_groups) == (4096, 8192, 128, 8)
    assert (config.n_layers, config.d_state, config.vocab_size) == (64, 128, 32768)
    assert not config.tie_embeddings and config.gate_norm_epsilon == 1e-5


@pytest.mark.parametrize("name", ["JambaForCausalLM", "BambaForCausalLM", "Zamba2ForCausalLM", "NemotronHForCausalLM"])
def test_hybrids_are_refused_by_name(name: str) -> None:
    with pytest.raises(SquamataError, match=f"'{name}' mixes Mamba with attention; hybrid models are not supported"):
        normalise({"architectures": [name]}, "config.json")


def test_hybrids_of_the_state_spaces_layout_are_refused() -> None:
    given = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "attn_layer_idx": [9, 18, 27], "ssm_cfg": {}}
    with pytest.raises(SquamataError, match=r"attn_layer_idx = \[9, 18, 27\] is not supported: hybrid models"):
        normalise(given, "config.json")
