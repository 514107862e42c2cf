"""Writers of foreign checkpoints for tests: tiny models in the state-spaces and Hugging Face layouts.

The name maps here are written out by hand, the other way round from ``squamata.load.layouts``, so that a wrong name
there is not repeated here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from squamata.load.hub import bundled
from squamata.models.config import ModelConfig, parameter_shapes

SHARED = Path(__file__).resolve().parents[3] / "shared"
REAL_MODELS = [bundled(), *sorted((SHARED / "models").glob("*"))]
Tensors = dict[str, torch.Tensor]


def tiny_config(kind: str, **overrides: Any) -> ModelConfig:
    """Two layers, every size different, so that no two axes can be confused."""
    sizes: dict[str, Any] = {"blocks": (kind,) * 2, "d_model": 24, "vocab_size": 40, "d_inner": 48, "d_state": 10}
    sizes |= {"dt_rank": 5} if kind == "mamba1" else {"head_dim": 8, "n_groups": 3}
    return ModelConfig(**(sizes | overrides))


def distinct_tensors(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Every element random, norms and D too: a swapped or dropped tensor cannot go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in parameter_shapes(config).items()}


def foreign_tensors(tensors: Tensors, embedding: str, first: bool) -> Tensors:
    """Our tensors under foreign names; ``first``: of Mamba-1."""
    ours_to_theirs = {
        "norm.weight": "norm.weight",
        "mixer.in_proj.weight": "mixer.in_proj.weight",
        "mixer.in_proj.bias": "mixer.in_proj.bias",
        "mixer.conv.weight": "mixer.conv1d.weight",
        "mixer.conv.bias": "mixer.conv1d.bias",
        "mixer.x_proj.weight": "mixer.x_proj.weight",
        "mixer.dt_proj.weight": "mixer.dt_proj.weight",
        "mixer.dt_bias": "mixer.dt_proj.bias" if first else "mixer.dt_bias",
        "mixer.A_log": "mixer.A_log",
        "mixer.D": "mixer.D",
        "mixer.gate_norm.weight": "mixer.norm.weight",
        "mixer.out_proj.weight": "mixer.out_proj.weight",
        "mixer.out_proj.bias": "mixer.out_proj.bias",
    }
    outside = {
        "embedding.weight": f"backbone.{embedding}.weight",
        "final_norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
    foreign: Tensors = {}
    for name, tensor in tensors.items():
        if name in outside:
            foreign[outside[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        stored = tensor.unsqueeze(1) if rest == "mixer.conv.weight" else tensor
        foreign[f"backbone.layers.{layer}.{ours_to_theirs[rest]}"] = stored
    return foreign


def write_files(folder: Path, config: dict[str, Any], foreign: Tensors, sharded: bool, binary: bool) -> None:
    """``config.json`` and the weights: one file, or three shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    names = list(foreign)
    size = math.ceil(len(names) / 3)
    parts = [names[start : start + size] for start in range(0, len(names), size)] if sharded else [names]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}" if sharded else f"{stem}.{suffix}"
        tensors = {name: foreign[name].contiguous() for name in part}
        torch.save(tensors, folder / file) if binary else save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if sharded:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def state_spaces_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` of mamba_ssm for one of our shapes."""
    ssm = {"layer": config.architecture.capitalize(), "d_state": config.d_state, "d_conv": config.d_conv}
    ssm |= {"expand": config.d_inner / config.d_model, "bias": config.projection_bias, "conv_bias": config.conv_bias}
    if config.architecture == "mamba1":
        ssm |= {"dt_rank": config.dt_rank}
    else:
        ssm |= {"headdim": config.head_dim, "ngroups": config.n_groups, "dt_limit": list(config.time_step_limit)}
    return {
        "d_model": config.d_model,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size - 3,  # padded to a multiple of 8 when it was trained
        "ssm_cfg": ssm,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": config.tie_embeddings,
    }


def write_state_spaces(
    folder: Path, config: ModelConfig, tensors: Tensors, sharded: bool = False, binary: bool = False
) -> None:
    """A checkpoint as mamba_ssm writes it."""
    foreign = foreign_tensors(tensors, "embedding", config.architecture == "mamba1")
    write_files(folder, state_spaces_config(config), foreign, sharded, binary)


def write_hugging_face(
    folder: Path, config: ModelConfig, tensors: Tensors, sharded: bool = False, binary: bool = False
) -> None:
    """A checkpoint as transformers writes it, without needing transformers."""
    first = config.architecture == "mamba1"
    theirs: dict[str, Any] = {
        "architectures": ["MambaForCausalLM" if first else "Mamba2ForCausalLM"],
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.d_inner / config.d_model,
        "use_bias": config.projection_bias,
        "use_conv_bias": config.conv_bias,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if first:
        theirs |= {"time_step_rank": config.dt_rank}
    else:
        theirs |= {"num_heads": config.n_heads, "head_dim": config.head_dim, "n_groups": config.n_groups}
        theirs |= {"time_step_limit": list(config.time_step_limit)}
    write_files(folder, theirs, foreign_tensors(tensors, "embeddings", first), sharded, binary)
