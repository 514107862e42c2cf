"""What the user sees when a checkpoint is bad: one line that names the file or tensor, and no code is run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from layout_writers import distinct_tensors, foreign_tensors, state_spaces_config, tiny_config, write_files
from safetensors.torch import load_file, save_file

from squamata.errors import SquamataError
from squamata.load import hub
from squamata.load.layouts import normalise
from squamata.load.source import open_source

SHARD = "model-00002-of-00003.safetensors"
CONFIG = tiny_config("mamba2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good sharded state-spaces checkpoint, for a test to spoil."""
    foreign = foreign_tensors(distinct_tensors(CONFIG), "embedding", first=False)
    write_files(tmp_path / "model", state_spaces_config(CONFIG), foreign, sharded=True, binary=False)
    return tmp_path / "model"


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(SquamataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json, so this is not a model folder" in refusal(lambda: open_source(tmp_path / "empty"))
    (folder / SHARD).unlink()
    assert f"{SHARD}: this shard is missing" in refusal(lambda: open_source(folder))
    (folder / "model.safetensors.index.json").unlink()
    assert "no weights; expected model.safetensors or pytorch_model.bin" in refusal(lambda: open_source(folder))


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_shard(folder: Path, kept: float) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: int(len(content) * kept)])
    assert f"{SHARD}: truncated or damaged (" in refusal(lambda: open_source(folder))


def test_a_shard_that_vanishes_or_shrinks_after_opening(folder: Path) -> None:
    source = open_source(folder)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:100])
    assert f"{SHARD}: truncated or damaged (" in refusal(source.tensors)
    (folder / SHARD).unlink()
    assert f"{SHARD}: truncated or damaged (" in refusal(source.tensors)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(tmp_path: Path, value: float, binary: bool) -> None:
    tensors = distinct_tensors(CONFIG, dtype=torch.bfloat16)
    tensors["layers.1.mixer.conv.weight"][-1, -1] = value
    foreign = foreign_tensors(tensors, "embedding", first=False)
    write_files(tmp_path, state_spaces_config(CONFIG), foreign, sharded=True, binary=binary)
    source = open_source(tmp_path)
    source.tensors("layers.0.")
    assert "'backbone.layers.1.mixer.conv1d.weight' holds NaN or infinity" in refusal(source.tensors)


def test_missing_extra_and_misshapen_tensors(folder: Path) -> None:
    name = "backbone.layers.0.mixer.A_log"
    edit_shard(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {name: SHARD}}))
    assert f"{SHARD}: tensor '{name}' has shape [7], config.json asks for [6]" in refusal(lambda: open_source(folder))

    del listed[name]
    index.write_text(json.dumps({"weight_map": listed}))
    assert f"tensor '{name}' is missing from the weights" in refusal(lambda: open_source(folder))

    index.write_text(json.dumps({"weight_map": listed | {name: SHARD, "backbone.other": SHARD}}))
    assert f"{SHARD}: tensor 'backbone.other' is missing, though" in refusal(lambda: open_source(folder))

    edit_shard(folder, lambda tensors: tensors.update({name: torch.zeros(6), "backbone.other": torch.zeros(1)}))
    assert f"{SHARD}: tensor 'backbone.other' has no place" in refusal(lambda: open_source(folder))


def test_the_first_wrong_tensor_is_named(folder: Path) -> None:
    edit_config(folder, n_layer=4)
    assert "tensor 'backbone.layers.2.norm.weight' is missing" in refusal(lambda: open_source(folder))
    edit_config(folder, n_layer=1)
    assert "tensor 'backbone.layers.1.mixer.A_log' has no place" in refusal(lambda: open_source(folder))
    edit_config(folder, n_layer=2, vocab_size=1000)
    assert "'backbone.embedding.weight' has shape [40, 24], config.json asks for [1000, 24]" in refusal(
        lambda: open_source(folder)
    )
    edit_config(folder, vocab_size=40, tie_embeddings=False)
    assert "tensor 'lm_head.weight' is missing" in refusal(lambda: open_source(folder))


def test_integer_weights_are_refused(folder: Path) -> None:
    name = "backbone.layers.0.mixer.out_proj.weight"
    edit_shard(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    source = open_source(folder)
    assert f"tensor '{name}' is int8; give a float checkpoint" in refusal(source.tensors)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/hostname", "sub/x.safetensors"])
def test_an_index_cannot_point_outside_its_folder(folder: Path, shard: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "this shard is missing" in refusal(lambda: open_source(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\ud800", "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_broken_json(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(lambda: open_source(folder)).startswith(str(folder / file))


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, write: Callable[..., Any], sharded: bool) -> None:
    foreign = foreign_tensors(distinct_tensors(CONFIG), "embedding", first=False)
    write_files(tmp_path, state_spaces_config(CONFIG), foreign, sharded=sharded, binary=True)
    file = next(tmp_path.glob("*.bin"))
    mark = tmp_path / "ran"
    write(foreign | {"x": Hostile(mark)}, file)
    assert f"{file}: refused, because it holds more than tensors" in refusal(lambda: open_source(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_bin(tmp_path: Path, kept: float, zipped: bool) -> None:
    foreign = foreign_tensors(distinct_tensors(CONFIG), "embedding", first=False)
    write_files(tmp_path, state_spaces_config(CONFIG), foreign, sharded=False, binary=True)
    file = tmp_path / "pytorch_model.bin"
    torch.save(foreign, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    assert refusal(lambda: open_source(tmp_path)).startswith(f"{file}: ")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"a": 1}, {3: torch.zeros(3)}, "text"])
def test_a_bin_that_is_no_state_dict(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert refusal(lambda: open_source(folder)).startswith(f"{folder / 'pytorch_model.bin'}: ")


STATE_SPACES: dict[str, Any] = {"d_model": 64, "n_layer": 2, "vocab_size": 100}
MAMBA2: dict[str, Any] = {"architectures": ["Mamba2ForCausalLM"], "hidden_size": 64, "num_heads": 2}


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architecture 'LlamaForCausalLM' is not supported (supported: MambaFor",
        ),
        (
            {"model_type": "jamba"},
            "architecture 'jamba' is not supported (supported: MambaForCausalLM, Mamba2ForCausalLM, F",
        ),
        ({"a": 1}, "neither the state-spaces layout"),
        (STATE_SPACES | {"attn_layer_idx": [3]}, "attn_layer_idx = [3] is not supported"),
        (STATE_SPACES | {"d_intermediate": 128}, "d_intermediate = 128 is not supported (supported: 0)"),
        (STATE_SPACES | {"rms_norm": False}, "rms_norm = False is not supported (supported: True)"),
        (
            STATE_SPACES | {"ssm_cfg": {"layer": "Mamba3"}},
            "ssm_cfg.layer = Mamba3 is not supported (supported: 'Mamba1'",
        ),
        (STATE_SPACES | {"ssm_cfg": {"d_ssm": 32}}, "ssm_cfg.d_ssm = 32 is not supported"),
        (STATE_SPACES | {"ssm_cfg": {"rmsnorm": False}}, "ssm_cfg.rmsnorm = False is not supported"),
        (STATE_SPACES | {"ssm_cfg": {"norm_before_gate": True}}, "ssm_cfg.norm_before_gate = True is not supported"),
        (STATE_SPACES | {"ssm_cfg": {"D_has_hdim": True}}, "ssm_cfg.D_has_hdim = True is not supported"),
        (STATE_SPACES | {"ssm_cfg": {"d_stat": 8}}, "'ssm_cfg.d_stat' is not supported (did you mean 'd_state'?)"),
        (STATE_SPACES | {"d_model": "wide"}, "d_model must be a whole number"),
        (STATE_SPACES | {"n_layer": 10**9}, "n_layer must be less than"),
        (STATE_SPACES | {"d_model": 0}, "d_model must be greater than"),
        ({"architectures": ["MambaLMHeadModel"], "d_model": 64}, "'n_layer' is missing"),
        (STATE_SPACES | {"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "head_dim 48 does not divide d_inner 128"),
        (MAMBA2 | {"head_dim": 32}, "num_heads 2 x head_dim 32 is not the inner size 128"),
        (MAMBA2 | {"head_dim": 64, "n_groups": 3}, "3 groups do not divide 2 heads"),
        (MAMBA2 | {"head_dim": 64, "n_groups": 2, "hidden_act": "gelu"}, "hidden_act = gelu is not supported"),
        (MAMBA2 | {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    ],
)
def test_configurations_that_are_not_supported(config: dict[str, Any], expected: str) -> None:
    message = refusal(lambda: normalise(config, "config.json"))
    assert message.startswith("config.json: ") and expected in message


def test_a_squamata_checkpoint_is_no_source(folder: Path) -> None:
    edit_config(folder, squamata_format=1)
    assert "is a Squamata checkpoint already" in refusal(lambda: open_source(folder))


def test_local_paths_are_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("")
    forms = (
        "./a/b",
        "../a/b",
        "/a/b",
        "~/a/b",
        "~nobody/a",
        "a/b/",
        "a/b/c",
        "word",
        "models/b",
        "x" * 300,
        Path("a/b"),
    )
    for form in forms:
        assert refusal(lambda form=form: hub.resolve(form)).startswith(f"{form}: no such folder")
    assert "is empty" in refusal(lambda: hub.resolve(""))
    assert "is a file" in refusal(lambda: hub.resolve("file"))
    assert "because the folder 'models' exists here" in refusal(lambda: hub.resolve("models/b"))


def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    """In a process of its own, whose hub is a port where nothing listens."""
    program = "import sys; from squamata.load.hub import resolve; resolve('state-spaces/mamba-130m')"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    environment |= {"PYTHONPATH": str(Path(hub.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "squamata.errors.SquamataError: state-spaces/mamba-130m: no such folder here, and the hub could"
    )
    assert last.endswith("; a local folder works too")


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(28, "No space left on device"), "cannot be stored in the hub's cache (No space left on device)"),
        (
            ConnectionError("name resolution"),
            "the hub could not be reached (name resolution); a local folder works too",
        ),
        (HTTPError("httpx\nsecond line"), "the hub could not be reached (httpx); a local folder works too"),
        (EntryNotFoundError("no entry"), "the hub could not be reached (no entry); a local folder works too"),
    ],
)
def test_failures_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert expected in refusal(lambda: hub.resolve("owner/name"))


def test_an_error_of_ours_is_not_taken_for_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise TypeError("a mistake in our call")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(TypeError, match="a mistake in our call"):
        hub.resolve("owner/name")


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_what_the_hub_has_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: bool) -> None:
    """Pickled weights are asked for only when the first answer holds no safetensors."""
    asked: list[list[str]] = []
    tensors = distinct_tensors(CONFIG)

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        foreign = foreign_tensors(tensors, "embedding", first=False)
        if not binary or "pytorch_model*.bin" in allow_patterns:
            write_files(tmp_path / name, state_spaces_config(CONFIG), foreign, sharded=False, binary=binary)
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "snapshot_download", download)
    source = open_source("owner/name")
    assert torch.equal(source.tensors()["layers.1.mixer.conv.weight"], tensors["layers.1.mixer.conv.weight"])
    assert len(asked) == (2 if binary else 1)
