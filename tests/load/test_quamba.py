"""Upstream Quamba checkpoints: the integers and scales of the files, and the logits of the model that was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quamba_writer import QuambaWriter, marlin_rows, marlin_tiles, qqq_rows, quamba_config, save, write_quamba
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids

from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.kernels.hadamard.matrices import base_matrix, hadamard_matrix
from squamata.kernels.qtensor import QTensor
from squamata.load.marlin import unpack_embedding, unpack_weight
from squamata.load.quamba import is_quamba_checkpoint, read_quamba
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.spec.recipe import Recipe

INT8 = {"bits": 8, "full_range": True}
AWAY = INT8 | {"rounding": "half-away"}
SEGMENT = INT8 | {"granularity": "segment"}
GROUP = {"bits": 4, "full_range": True, "granularity": "group(128)"}
ROW = {"full_range": True, "granularity": "channel", "scale_dtype": "float16"}


def recipe(kind: str, precision: str, small_ends: bool) -> Recipe:
    """What upstream does at this precision. ``small_ends``: embedding and head in few bits too."""
    rules: list[dict[str, Any]] = []
    if precision == "W4A16":
        group = GROUP | {"scale_dtype": "float16"}
    else:
        group = GROUP
        rules += [{"site": "*.mixer.*", "spec": INT8}, {"site": "*.mixer.y", "spec": "float"}]
        rules += [{"site": "*.mixer.u", "spec": AWAY}, {"site": "*.mixer.[BC]_conv", "spec": AWAY}]
        if kind == "mamba1":
            rules += [{"site": "*.mixer.state", "spec": AWAY}]
        else:
            rules += [{"site": f"*.mixer.{name}", "spec": SEGMENT} for name in ("in_proj.weight", "conv.*")]
            rules += [{"site": "*.mixer.dt_bias", "spec": "float"}]
    if precision.startswith("W4"):
        rules += [{"site": f"*.mixer.{name}.weight", "spec": group} for name in ("in_proj", "x_proj", "out_proj")]
    if small_ends:
        rules += [{"site": "embedding.weight", "spec": ROW | {"bits": int(precision[1])}}]
        rules += [{"site": "head.weight", "spec": group if precision.startswith("W4") else INT8}]
        rules += [] if precision == "W4A16" else [{"site": "head.in", "spec": INT8}]
    return Recipe.from_mapping({"name": "upstream", "transforms": ["hadamard"], "rules": rules})


def made(kind: str, precision: str, small_ends: bool = True, **overrides: Any) -> Checkpoint:
    """A checkpoint of ours that upstream's format can say: sites that share a scale there share it here."""
    sizes: dict[str, Any] = {"d_model": 256, "d_inner": 512, "vocab_size": 72, "tie_embeddings": False}
    sizes |= {"dt_rank": 16} if kind == "mamba1" else {"head_dim": 64, "n_groups": 2}
    config = config_of(kind, **(sizes | overrides))
    batches = [random_ids(config, 2, 24)] if precision != "W4A16" else []
    checkpoint = quantized(config, perturbed_tensors(config), recipe(kind, precision, small_ends), batches)
    sites = dict(checkpoint.site_tensors)
    for name in list(sites):
        layer, _, last = name.removesuffix(".scale").rpartition(".")
        if kind == "mamba1" and last in ("z", "B", "C"):
            sites[name] = sites[f"{layer}.{'x' if last == 'z' else 'dt_low'}.scale"]
    return replace(checkpoint, site_tensors=sites)


def assert_same(found: Checkpoint, written: Checkpoint) -> None:
    """Integers, scales and specs are those of the files, exactly; the rotation is theirs."""
    assert found.config == written.config
    kinds = written.config.blocks
    assert found.recipe.resolve(kinds) == {
        name: spec.model_copy(update={"scale": type(spec.scale)()}) for name, spec in written.recipe.resolve(kinds).items()
    }
    for name, value in written.tensors.items():
        other = found.tensors[name]
        if isinstance(value, QTensor):
            assert isinstance(other, QTensor), name
            assert torch.equal(other.codes(), value.codes()), name
            assert torch.equal(other.scale, value.scale), name
        else:
            assert torch.equal(other, value), name
    extra = found.tensors.keys() - written.tensors.keys()
    assert {name.rpartition(".")[2] for name in extra} == {"rotation_family"}
    assert found.site_tensors.keys() == written.site_tensors.keys()
    for name, tensor in written.site_tensors.items():
        assert torch.equal(found.site_tensors[name], tensor.float() if tensor.is_floating_point() else tensor), name


@torch.no_grad()
def assert_same_logits(found: Checkpoint, written: Checkpoint) -> None:
    """The rotations agree where the inner size is a power of two, so nothing may differ: prefill and decode."""
    ids = random_ids(written.config, 1, 12, seed=3)
    for backend in ("ref", None):
        with use_backend(backend) if backend else torch.no_grad():
            models = [LanguageModel(checkpoint) for checkpoint in (found, written)]
            assert torch.equal(*(model(ids) for model in models))
            caches = [model.new_cache() for model in models]
            for token in ids[0, :4]:
                steps = [model.step(token[None], cache) for model, cache in zip(models, caches, strict=True)]
                assert torch.equal(*steps)


@pytest.mark.parametrize("small_ends", [True, False], ids=["whole", "layers-only"])
@pytest.mark.parametrize("precision", ["W8A8", "W4A8", "W4A16"])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_reading_gives_what_was_written(tmp_path: Path, kind: str, precision: str, small_ends: bool) -> None:
    written = write_quamba(tmp_path, made(kind, precision, small_ends), precision)
    assert is_quamba_checkpoint(tmp_path)
    found = read_quamba(tmp_path)
    assert_same(found, written)
    assert_same_logits(found, written)
