"""NVIDIA's Megatron layout: the same tensors and logits, no code of the pickle run, and clear refusals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_writer import megatron_content, megatron_tensors, write_megatron
from tiny import config_of, float_model, perturbed_tensors, random_ids

from squamata.conversion import convert
from squamata.errors import SquamataError
from squamata.load import megatron
from squamata.load.inert_pickle import Inert, read_inert
from squamata.load.source import open_source
from squamata.models.config import SHAPES, ModelConfig, parameter_shapes
from squamata.pipeline import load, quantize
from squamata.save.read import read_checkpoint


def small(**overrides: Any) -> ModelConfig:
    """G = 8 and d_state 128, which the published file's settings do not say, and an untied head."""
    sizes = {"d_model": 48, "d_inner": 128, "head_dim": 8, "n_groups": 2, "d_state": 128, "tie_embeddings": False}
    return config_of("mamba2", **(sizes | overrides))


@pytest.mark.parametrize("fused_norm", [False, True], ids=["norm", "fused-norm"])
@pytest.mark.parametrize("where", ["release/mp_rank_00", "iter_0000123/mp_rank_00", "mp_rank_00", "."])
def test_tensors_arrive_under_our_names(tmp_path: Path, where: str, fused_norm: bool) -> None:
    config = small()
    tensors = perturbed_tensors(config, dtype=torch.bfloat16)
    write_megatron(tmp_path, megatron_content(config, tensors, fused_norm), where)
    source = open_source(tmp_path)
    assert (source.config, source.layout) == (config, "Megatron")
    found = source.tensors()
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@torch.no_grad()
def test_converted_is_the_same_model_and_can_be_quantized(tmp_path: Path) -> None:
    config = small(n_groups=8, d_state=16, norm_epsilon=1e-6)
    tensors = perturbed_tensors(config)
    content = megatron_content(config, tensors, mamba_state_dim=16, mamba_num_groups=8, norm_epsilon=1e-6)
    write_megatron(tmp_path / "given", content)
    steps: list[tuple[int, int]] = []
    result = convert(tmp_path / "given", tmp_path / "ours", progress=lambda done, total: steps.append((done, total)))
    assert (result.layout, result.recipe, result.tokenizer) == ("Megatron", "float", "none found")
    assert steps[-1] == (5, 5) and result.bytes == sum(tensor.nbytes for tensor in tensors.values())
    ids = random_ids(config, 2, 9)
    expected = float_model(config, tensors)(ids)
    for folder in (tmp_path / "given", tmp_path / "ours"):
        assert torch.equal(load(folder)(ids), expected)
    assert read_checkpoint(tmp_path / "ours").provenance["converted_from"] == "Megatron"
    for folder in ("given", "ours"):
        quantize(tmp_path / folder, "w4a16", tmp_path / f"{folder}-w4a16")
    first, second = (tmp_path / f"{folder}-w4a16/model.safetensors" for folder in ("given", "ours"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(SquamataError, match="is a Squamata checkpoint already"):
        convert(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(SquamataError, match="is a Squamata checkpoint already"):
        open_source(tmp_path / "ours-w4a16")


def test_the_published_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mamba2-8B by the shapes of its tensors alone, which take no memory here."""
    config = SHAPES["mamba2-8b"]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in parameter_shapes(config).items()}
    content = {"model": megatron_tensors(tensors, False)}
    monkeypatch.setattr(megatron, "read_inert", lambda path: content)
    assert megatron.megatron_config(megatron.MegatronFile(tmp_path / "model_optim_rng.pt")) == config


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the pickle was run')",)


def test_no_code_is_run_and_unknown_classes_are_inert(tmp_path: Path) -> None:
    config = small()
    content = megatron_content(config, perturbed_tensors(config))
    content["args"].hook = Evil()
    content["evil"] = [Evil(), {"deep": Evil()}]
    path = write_megatron(tmp_path, content)
    found = read_inert(path)
    assert isinstance(found["evil"][0], Inert) and isinstance(found["args"].hook, Inert)
    assert isinstance(found["args"].attention_backend, Inert)
    assert open_source(tmp_path).config == config
    code = f"from squamata.load.source import open_source; print(open_source({str(tmp_path)!r}).config.d_model)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "48", done.stderr
    torch.save(Evil(), path)
    with pytest.raises(SquamataError, match="has no 'model'"):
        open_source(tmp_path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SquamataError, match=r"not a file of torch.save"):
        open_source(tmp_path)
    path.write_bytes(write_megatron(tmp_path / "other", content).read_bytes()[:5000])
    with pytest.raises(SquamataError) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def changed(content: dict[str, Any], **tensors: torch.Tensor | None) -> dict[str, Any]:
    model = content["model"] | {name.replace("__", "."): value for name, value in tensors.items()}
    return content | {"model": {name: value for name, value in model.items() if value is not None}}


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    config = small()
    content = megatron_content(config, perturbed_tensors(config))
    attention = {"decoder__layers__1__self_attention__linear_qkv__weight": torch.zeros(3, 3)}
    cases = [
        (changed(content, **attention), "layer 1 has 'self_attention.linear_qkv.weight'.*hybrid models are not supp"),
        (changed(content, decoder__layers__0__mixer__x_proj__weight=torch.zeros(2, 2)), "layer 0 is a Mamba-1"),
        (changed(content, decoder__layers__0__mixer__A_log=None), "no usable tensor 'mixer.A_log'"),
        (changed(content, decoder__layers__0__mixer__A_log=torch.zeros(0)), "0 heads do not divide 128 channels"),
        (content | {"model": content["model"] | {3: torch.zeros(1)}}, "'3' is not a plain tensor"),
        (changed(content, decoder__layers__1__mixer__D=None), "'decoder.layers.1.mixer.D' is missing"),
        (changed(content, decoder__layers__1__mixer__D=torch.zeros(3)), r"has shape \[3\], the rest of the file asks"),
        (changed(content, decoder__layers__1__mixer__extra=torch.zeros(3)), "has no place in a model"),
        (megatron_content(config, {}), "its layers are not 0, 1, 2"),
        (megatron_content(config, perturbed_tensors(config), normalization="LayerNorm"), "LayerNorm is not supported"),
        (megatron_content(config, perturbed_tensors(config), apply_layernorm_1p=True), "apply_layernorm_1p"),
        (megatron_content(config, perturbed_tensors(config), tensor_model_parallel_size=4), "one of 4 parts"),
        (megatron_content(config, perturbed_tensors(config), mamba_num_groups=3), "are not 3 groups of 128 states"),
    ]
    for number, (given, message) in enumerate(cases):
        write_megatron(tmp_path / str(number), given)
        with pytest.raises(SquamataError, match=message) as caught:
            open_source(tmp_path / str(number))
        assert "\n" not in str(caught.value)
    write_megatron(tmp_path / "split", content, "release/mp_rank_00")
    write_megatron(tmp_path / "split", content, "release/mp_rank_01")
    with pytest.raises(SquamataError, match="split over 2 ranks"):
        open_source(tmp_path / "split")
    write_megatron(tmp_path / "two", content, "iter_0000001/mp_rank_00")
    write_megatron(tmp_path / "two", content, "iter_0000002/mp_rank_00")
    with pytest.raises(SquamataError, match="holds 2 Megatron checkpoints"):
        open_source(tmp_path / "two")


def test_a_converted_folder_that_was_damaged(tmp_path: Path) -> None:
    config = small()
    write_megatron(tmp_path / "given", megatron_content(config, perturbed_tensors(config)))
    convert(tmp_path / "given", tmp_path / "ours")
    path = tmp_path / "ours/config.json"
    described = json.loads(path.read_text())
    del described["model"]["d_inner"]
    path.write_text(json.dumps(described))
    with pytest.raises(SquamataError, match=r"config.json is damaged"):
        open_source(tmp_path / "ours")
