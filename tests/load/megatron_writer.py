"""Writes checkpoints in Megatron's layout, as NVIDIA published its Mamba2-8B: weights beside pickled settings."""

from __future__ import annotations

import argparse
import enum
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from squamata.models.config import ModelConfig

Tensors = dict[str, torch.Tensor]


class AttnBackend(enum.Enum):
    """A class that whoever reads the file does not have."""

    flash = 1


def megatron_tensors(tensors: Tensors, fused_norm: bool) -> Tensors:
    """Our tensors under Megatron's names."""
    inside = {
        "norm.weight": "mixer.in_proj.layer_norm_weight" if fused_norm else "norm.weight",
        "mixer.in_proj.weight": "mixer.in_proj.weight",
        "mixer.conv.weight": "mixer.conv1d.weight",
        "mixer.conv.bias": "mixer.conv1d.bias",
        "mixer.dt_bias": "mixer.dt_bias",
        "mixer.A_log": "mixer.A_log",
        "mixer.D": "mixer.D",
        "mixer.gate_norm.weight": "mixer.norm.weight",
        "mixer.out_proj.weight": "mixer.out_proj.weight",
    }
    outside = {
        "embedding.weight": "embedding.word_embeddings.weight",
        "final_norm.weight": "decoder.final_norm.weight",
        "head.weight": "output_layer.weight",
    }
    foreign: Tensors = OrderedDict()
    for name, tensor in tensors.items():
        if name in outside:
            foreign[outside[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        stored = tensor.unsqueeze(1) if rest == "mixer.conv.weight" else tensor
        foreign[f"decoder.layers.{layer}.{inside[rest]}"] = stored
    return foreign


def megatron_content(
    config: ModelConfig, tensors: Tensors, fused_norm: bool = False, **arguments: Any
) -> dict[str, Any]:
    """What is pickled: with settings, enumerations, random states and the extra states of Transformer Engine."""
    settings = {"num_layers": config.n_layers, "hidden_size": config.d_model, "normalization": "RMSNorm"}
    settings |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "params_dtype": torch.bfloat16}
    settings |= {"attention_backend": AttnBackend.flash, "untie_embeddings_and_output_weights": True}
    model: dict[str, Any] = dict(megatron_tensors(tensors, fused_norm))
    model["decoder.layers.0.mixer.in_proj._extra_state"] = io.BytesIO(b"state of a kernel")
    state = np.random.RandomState(0).get_state()
    return {
        "args": argparse.Namespace(**(settings | arguments)),
        "checkpoint_version": 3.0,
        "iteration": 835248,
        "model": OrderedDict(model),
        "opt_param_scheduler": {"max_lr": 1e-4},
        "rng_state": [{"np_rng_state": state, "torch_rng_state": torch.get_rng_state(), "seen": {1, 2}}],
    }


def write_megatron(folder: Path, content: Any, where: str = "release/mp_rank_00") -> Path:
    path = folder / where / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return path
