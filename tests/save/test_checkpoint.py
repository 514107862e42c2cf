"""A checkpoint comes back bit for bit, in a new process; a failed or killed save loses nothing; damage is named."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from judged import SHIPPED
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

import squamata.save.write as writing
from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.kernels.packing import pack_int4
from squamata.kernels.qtensor import QTensor
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.pipeline import quantize
from squamata.save.format import VERSION
from squamata.save.read import read_checkpoint
from squamata.save.write import CheckpointWriter, write_checkpoint
from squamata.spec.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
INT8_ROWS = {"bits": 8, "granularity": "channel"}
EVERYTHING = [
    {"site": "*.mixer.*", "spec": {"bits": 8}},
    {"site": "*.mixer.x", "spec": {"bits": 8, "granularity": "channel", "symmetric": False}},
    {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "group(4)"}},
    {"site": "*.mixer.in", "spec": {"bits": 8, "granularity": "token", "dynamic": True}},
    {"site": "*.in_proj.weight", "spec": {"bits": 4, "granularity": "group(5)", "scale_dtype": "float16"}},
    {"site": "*.out_proj.weight", "spec": {"bits": 4, "granularity": "group(7)", "symmetric": False}},
    {"site": "*.conv.weight", "spec": {"bits": 4, "granularity": "channel,tap"}},
]
OWN = {
    "embedding-only": recipe_of({"site": "embedding.weight", "spec": INT8_ROWS}),
    "head-only": recipe_of({"site": "head.weight", "spec": INT8_ROWS}, {"site": "head.in", "spec": {"bits": 8}}),
    "both-4-bit": recipe_of({"site": "[eh]*.weight", "spec": {"bits": 4, "granularity": "group(8)"}}),
    "everything": recipe_of(*EVERYTHING, transforms=["hadamard"]),
}
RECIPES = {name: Recipe.read(name) for name in SHIPPED} | OWN


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with use_backend("ref"):
        yield


def tiny_checkpoint(kind: str, recipe: str, tied: bool = True) -> Checkpoint:
    config = config_of(kind, tie_embeddings=tied)
    return quantized(config, perturbed_tensors(config), RECIPES[recipe], [random_ids(config, 2, 16)])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_nothing_beside(folder: Path, *names: str) -> None:
    assert {path.name for path in folder.iterdir()} == set(names)


@torch.no_grad()
def test_a_new_process_gives_bit_identical_logits(tmp_path: Path) -> None:
    """Every recipe, both architectures, tied and untied, quantized embedding and head or not; one process for all."""
    expected = {}
    pairs = [(kind, name) for name, recipe in RECIPES.items() for kind in recipe.architectures]
    for kind, recipe in pairs:
        for tied in (True, False):
            name = f"{kind}-{recipe}-{'tied' if tied else 'untied'}"
            checkpoint = tiny_checkpoint(kind, recipe, tied)
            assert write_checkpoint(checkpoint, tmp_path / name) == checkpoint_size_stored(tmp_path / name)
            expected[name] = LanguageModel(checkpoint)(random_ids(checkpoint.config, 2, 21, seed=5))
    code = f"""
import sys, torch, safetensors.torch
sys.path[:0] = [{str(ROOT)!r}]
torch.set_num_threads(1)
from pathlib import Path
from squamata.kernels.dispatch import use_backend
import squamata
found = {{}}
ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(5))
with use_backend("ref"), torch.no_grad():
    for folder in Path({str(tmp_path)!r}).iterdir():
        found[folder.name] = squamata.load(folder)(ids)
safetensors.torch.save_file(found, {str(tmp_path / "found.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    found = safetensors.torch.load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys() and len(found) == 2 * len(pairs)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def checkpoint_size_stored(folder: Path) -> int:
    return sum(
        tensor.nbytes for path in folder.glob("*.safetensors") for tensor in safetensors.torch.load_file(path).values()
    )


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_the_head_stays_tied_unless_it_is_represented_differently(kind: str, tmp_path: Path) -> None:
    for recipe, tied in (
        ("float", True),
        ("quamba-w8a8-tied", True),
        ("quamba-w8a8", False),
        ("embedding-only", False),
        ("head-only", False),
    ):
        checkpoint = tiny_checkpoint(kind, recipe)
        assert checkpoint.config.tie_embeddings == tied
        assert ("head.weight" in checkpoint.tensors) == (not tied)
        write_checkpoint(checkpoint, tmp_path / recipe)
        again = read_checkpoint(tmp_path / recipe)
        assert again.config == checkpoint.config and again.recipe == checkpoint.recipe


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_what_is_read_is_what_was_written(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(kind, "everything")
    checkpoint.provenance |= {"seed": 3, "calibration": {"samples": 2}}
    write_checkpoint(checkpoint, tmp_path / "saved")
    again = read_checkpoint(tmp_path / "saved")
    assert (
        again.tensors.keys() == checkpoint.tensors.keys()
        and again.site_tensors.keys() == checkpoint.site_tensors.keys()
    )
    for name, value in checkpoint.tensors.items():
        found = again.tensors[name]
        if isinstance(value, QTensor):
            assert isinstance(found, QTensor) and torch.equal(found.data, value.data) and found.spec == value.spec
            assert torch.equal(found.dequantize(), value.dequantize()), name
        else:
            assert torch.equal(found, value) and found.dtype == value.dtype
    assert all(torch.equal(again.site_tensors[name], value) for name, value in checkpoint.site_tensors.items())
    assert again.provenance == {"seed": 3, "calibration": {"samples": 2}}
    assert again.config == checkpoint.config and again.recipe == checkpoint.recipe


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("recipe", ["quamba-w8a8", "w4a16"])
def test_two_runs_write_the_same_bytes(
    kind: str, recipe: str, shipped: Callable[[str, str], Path], bundled_folder: Path, bundled_calibration: Path,
    tiny_mamba1: Path, tmp_path: Path,
) -> None:  # fmt: skip
    source = bundled_folder if kind == "mamba2" else tiny_mamba1
    quantize(source, recipe, tmp_path / "again", calibration=bundled_calibration, samples=4, length=48, seed=1)
    assert files_of(tmp_path / "again") == files_of(shipped(kind, recipe))


def test_int4_bytes_are_those_of_the_format() -> None:
    assert bytes(pack_int4(torch.tensor([[1, -2, 7, -8, 3]], dtype=torch.int8)).flatten().tolist()) == b"\xe1\x87\x03"


def test_the_file_holds_the_bytes_of_the_format(tmp_path: Path) -> None:
    """Read with nothing but struct and json: row 0 of a 4-bit weight, its float16 scale, and an int8 code."""
    config = config_of("mamba1", blocks=("mamba1",))
    tensors = perturbed_tensors(config)
    tensors["layers.0.mixer.out_proj.weight"][0] = torch.tensor([7.0, -7.0, 3.0, 0.0, -1.0, 2.0] + [0.0] * 58) / 4
    tensors["layers.0.mixer.D"][:] = torch.arange(64) - 20.0
    recipe = recipe_of(
        {"site": "*.out_proj.weight", "spec": {"bits": 4, "granularity": "channel", "scale_dtype": "float16"}},
        {"site": "*.mixer.D", "spec": {"bits": 8}},
    )
    write_checkpoint(quantized(config, tensors, recipe, []), tmp_path / "saved")
    content = (tmp_path / "saved" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])

    def stored(name: str) -> bytes:
        start, end = header[name]["data_offsets"]
        return content[8 + length + start : 8 + length + end]

    name = "layers.0.mixer.out_proj.weight"
    assert (header[name]["dtype"], header[name]["shape"]) == ("U8", [32, 32])
    assert stored(name)[:32] == b"\x97\x03\x2f" + b"\x00" * 29
    assert header[f"{name}.scale"]["dtype"] == "F16" and stored(f"{name}.scale")[:2] == struct.pack("<e", 0.25)
    assert header["layers.0.mixer.D"]["dtype"] == "I8"
    scale = struct.unpack("<f", stored("layers.0.mixer.D.scale"))[0]
    assert math.isclose(scale, 43 / 127, rel_tol=1e-6)
    assert stored("layers.0.mixer.D") == bytes(round((value - 20) / (43 / 127)) % 256 for value in range(64))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_shards_hold_the_same_model(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(kind, "everything")
    write_checkpoint(checkpoint, tmp_path / "whole")
    with CheckpointWriter(tmp_path / "sharded", checkpoint.config, shard_bytes=5000) as writer:
        for name, value in checkpoint.tensors.items():
            writer.add({name: value})
        writer.add(checkpoint.site_tensors)
        writer.publish(json.loads((tmp_path / "whole" / "config.json").read_text()), None)
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    count = len(shards)
    assert count > 2 and shards == [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    whole = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "sharded" / shard, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), whole[name])
    ids = random_ids(checkpoint.config, 1, 9)
    models = [LanguageModel(read_checkpoint(tmp_path / name)) for name in ("whole", "sharded")]
    assert torch.equal(models[0](ids), models[1](ids))


# ---------------------------------------------------------------- a save that fails, or is killed


def small() -> Checkpoint:
    config = config_of("mamba1", blocks=("mamba1",))
    return Checkpoint(config, perturbed_tensors(config), Recipe.read("float"))


def test_an_existing_folder_is_not_touched_without_force(tmp_path: Path) -> None:
    write_checkpoint(small(), tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(SquamataError, match="--force"):
        write_checkpoint(small(), tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert_nothing_beside(tmp_path, "out")


def test_force_replaces_a_checkpoint_or_an_empty_folder_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(small(), tmp_path / "out")
    (tmp_path / "out" / "stale.bin").write_text("old")
    write_checkpoint(small(), tmp_path / "out", force=True)
    assert set(files_of(tmp_path / "out")) == {"config.json", "model.safetensors"}
    (tmp_path / "empty").mkdir()
    write_checkpoint(small(), tmp_path / "empty", force=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("precious", "file", "."):
        with pytest.raises(SquamataError, match="replaces nothing else"):
            write_checkpoint(small(), tmp_path / name, force=True)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years"
    assert_nothing_beside(tmp_path, "out", "empty", "precious", "file")


def test_force_does_not_replace_the_float_source(tiny_mamba1: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_mamba1, source)
    before = files_of(source)
    with pytest.raises(SquamataError):
        quantize(source, "w4a16", source, force=True)
    assert files_of(source) == before


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", small().config) as writer:
        write_checkpoint(small(), tmp_path / "other")
        (tmp_path / "other").rename(tmp_path / "out")
        before = files_of(tmp_path / "out")
        writer.add({"final_norm.weight": torch.ones(32)})
        with pytest.raises(SquamataError, match="exists already"):
            writer.publish({}, None)
    assert files_of(tmp_path / "out") == before
    assert_nothing_beside(tmp_path, "out")


def test_parents_are_made_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    write_checkpoint(small(), tmp_path / "a" / "b" / "out")
    assert read_checkpoint(tmp_path / "a" / "b" / "out").config == small().config
    (tmp_path / "file").write_text("x")
    with pytest.raises(SquamataError, match="cannot write"):
        write_checkpoint(small(), tmp_path / "file" / "out")


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = {
    "tensors": (safetensors.torch, "save_file", FULL),
    "tensors-in-rust": (
        safetensors.torch,
        "save_file",
        safetensors.SafetensorError("I/O error: No space left on device"),
    ),
    "config": (Path, "write_text", FULL),
    "sync": (writing.os, "fsync", FULL),
}


@pytest.mark.parametrize("case", list(FAILURES))
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_changes_nothing(
    case: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {}
    if existing:
        write_checkpoint(small(), tmp_path / "out")
        before = files_of(tmp_path / "out")
    owner, name, error = FAILURES[case]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(SquamataError, match="No space left on device") as caught:
            write_checkpoint(small(), tmp_path / "out", force=True)
    assert "\n" not in str(caught.value)
    assert_nothing_beside(tmp_path, *(["out"] if existing else []))
    assert not existing or files_of(tmp_path / "out") == before


KILLED_WHILE = {
    "writing-tensors": """
def save_file(tensors, path, metadata=None):
    Path(path).write_bytes(b"half a file")
    os.kill(os.getpid(), 9)
safetensors.torch.save_file = save_file
""",
    "writing-config": "Path.write_text = lambda self, text: os.kill(os.getpid(), 9)\n",
    "syncing": "os.fsync = lambda file: os.kill(os.getpid(), 9)\n",
    "between-renames": """
rename = Path.rename
def rename_and_die(self, target):
    result = rename(self, target)
    if "replaced" in str(target):
        os.kill(os.getpid(), 9)
    return result
Path.rename = rename_and_die
""",
    "removing-the-old": "shutil.rmtree = lambda path, **k: os.kill(os.getpid(), 9)\n",
}


def save_and_die(folder: Path, how: str) -> None:
    code = f"""
import os, shutil, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "load")!r}]
import safetensors.torch
from tiny import config_of, perturbed_tensors
from squamata.models.checkpoint import Checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.recipe import Recipe
config = config_of("mamba1", blocks=("mamba1",))
checkpoint = Checkpoint(config, perturbed_tensors(config, seed=9), Recipe.read("float"))
{KILLED_WHILE[how]}
write_checkpoint(checkpoint, Path({str(folder)!r}), force=True)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize("how", list(KILLED_WHILE))
def test_kill_9_leaves_the_old_checkpoint_or_none(how: str, tmp_path: Path) -> None:
    """And the next save clears up: in the instant between the renames, by putting the old one back first."""
    write_checkpoint(small(), tmp_path / "out")
    before = files_of(tmp_path / "out")
    save_and_die(tmp_path / "out", how)
    if how == "between-renames":
        assert not (tmp_path / "out").exists()
        with pytest.raises(SquamataError, match="--force"), CheckpointWriter(tmp_path / "out", small().config):
            pass
    if how == "removing-the-old":
        assert read_checkpoint(tmp_path / "out").config == small().config and files_of(tmp_path / "out") != before
    else:
        assert files_of(tmp_path / "out") == before
    write_checkpoint(small(), tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == before
    assert_nothing_beside(tmp_path, "out")


def test_kill_9_of_a_first_save_leaves_none(tmp_path: Path) -> None:
    save_and_die(tmp_path / "out", "writing-tensors")
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.partial-mine").mkdir()  # not ours: no number
    write_checkpoint(small(), tmp_path / "out")
    assert_nothing_beside(tmp_path, "out", ".out.partial-mine")


def test_a_living_writer_is_told_from_left_overs_of_any_number(tmp_path: Path) -> None:
    for number in ("0", "1", str(os.getpid()), "00c0ffee", "f" * 16):
        (tmp_path / f".out.partial-{number}").mkdir()
        (tmp_path / f".out.replaced-{number}").mkdir()
    (tmp_path / ".out.partial-abc").write_text("a file")
    (tmp_path / ".out.replaced-abd").write_text("a file")
    (tmp_path / ".out.partial-1" / writing.LOCK).write_text("")
    write_checkpoint(small(), tmp_path / "out", force=True)
    assert_nothing_beside(tmp_path, "out", ".out.partial-abc", ".out.replaced-abd")
    before = files_of(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", small().config, force=True) as slow:
        write_checkpoint(small(), tmp_path / "out", force=True)
        assert slow.partial.is_dir() and files_of(tmp_path / "out") == before
        slow.add(small().tensors)
        slow.publish(json.loads(before["config.json"]), None)
    assert files_of(tmp_path / "out") == before
    assert_nothing_beside(tmp_path, "out", ".out.partial-abc", ".out.replaced-abd")


def test_the_old_checkpoint_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(small(), tmp_path / "out")
    before = files_of(tmp_path / "out")
    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if "partial" in self.name and target.name == "out":
            raise FULL
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(SquamataError, match="nothing was changed"):
        write_checkpoint(small(), tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == before
    assert_nothing_beside(tmp_path, "out")


def test_the_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(writing, "_sync_folder", lambda folder: synced.append((folder, (tmp_path / "out").exists())))
    write_checkpoint(small(), tmp_path / "out")
    assert synced[-1] == (tmp_path, True) and not synced[0][1]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_follows_the_umask(umask: int, tmp_path: Path, bundled_folder: Path) -> None:
    checkpoint = small()
    checkpoint.folder = bundled_folder
    before = os.umask(umask)
    try:
        write_checkpoint(checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "pristine"
    with use_backend("ref"):
        write_checkpoint(tiny_checkpoint("mamba2", "everything"), folder)
    return folder


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "saved")
    return tmp_path / "saved"


def said(folder: Path) -> str:
    with pytest.raises(SquamataError) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace one tensor, add it, or take it out."""
    tensors = tensors_of(folder)
    tensors.pop(name, None)
    safetensors.torch.save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


def test_every_missing_misshapen_or_mistyped_tensor_is_named(saved: Path) -> None:
    original = tensors_of(saved)
    assert {
        "layers.0.mixer.rotation",
        "layers.1.mixer.x.zero",
        "layers.0.mixer.out_proj.weight.zero",
    } <= original.keys()
    for name, tensor in original.items():
        change(saved, name, None)
        assert f"'{name}' is missing" in said(saved)
        change(saved, name, torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]]))
        assert f"'{name}' has shape" in said(saved)
        change(saved, name, tensor.to(torch.int32))
        assert f"'{name}' is torch.int32" in said(saved)
        change(saved, name, tensor)
    assert read_checkpoint(saved)


def test_extra_tensors_are_named(saved: Path) -> None:
    for name in ("layers.9.norm.weight", "extra", "extra.zero", "layers.0.mixer.u.index", "layers.7.mixer.rotation"):
        change(saved, name, torch.ones(2))
        assert f"'{name}'" in said(saved)
        change(saved, name, None)


def test_nan_and_infinity_are_named(saved: Path) -> None:
    for name, tensor in tensors_of(saved).items():
        if tensor.is_floating_point():
            for value in (math.nan, math.inf):
                bad = tensor.clone()
                bad.view(-1)[-1] = value
                change(saved, name, bad)
                assert f"'{name}' holds NaN" in said(saved)
            change(saved, name, tensor)


def test_scales_that_are_not_above_zero_are_named(saved: Path) -> None:
    for name, tensor in tensors_of(saved).items():
        if name.endswith(".scale"):
            for value in (0.0, -0.25):
                bad = tensor.clone()
                bad.view(-1)[-1] = value
                change(saved, name, bad)
                assert f"'{name}' holds a scale that is not above zero" in said(saved)
            change(saved, name, tensor)


def test_a_rotation_that_is_none_is_refused(saved: Path) -> None:
    for values in ((32, 32), (64, 48), (64, 0), (64, -64), (-64, 64), (0, 0), (64, 128), (2**62, 2)):
        change(saved, "layers.1.mixer.rotation", torch.tensor(values))
        with pytest.raises(SquamataError, match=r"mixer\.rotation' holds") as caught:
            LanguageModel(read_checkpoint(saved))
        assert "\n" not in str(caught.value)


def ragged_checkpoint(index: torch.Tensor, scale: torch.Tensor) -> Checkpoint:
    """Scales of `y`, heads x channels of Mamba-2, by a map of the heads."""
    config = config_of("mamba2", blocks=("mamba2",))
    recipe = recipe_of({"site": "*.mixer.y", "spec": {"bits": 8, "granularity": "index"}})
    sites = {"layers.0.mixer.y.index": index, "layers.0.mixer.y.scale": scale}
    return Checkpoint(config, perturbed_tensors(config), recipe, sites)


@torch.no_grad()
def test_the_map_of_a_ragged_site_survives_and_must_fit(tmp_path: Path) -> None:
    good = ragged_checkpoint(torch.tensor([1, 0, 2, 1]), torch.tensor([0.1, 0.2, 0.05]))
    write_checkpoint(good, tmp_path / "good")
    ids = random_ids(good.config, 1, 7)
    assert torch.equal(LanguageModel(read_checkpoint(tmp_path / "good"))(ids), LanguageModel(good)(ids))
    for number, (index, scales) in enumerate([([1, 0, 3, 1], 3), ([1, 0, -1, 1], 3), ([0, 1], 2), ([0, 0, 0, 0], 2)]):
        folder = tmp_path / str(number)
        write_checkpoint(ragged_checkpoint(torch.tensor(index), torch.full((scales,), 0.1)), folder)
        assert "'layers.0.mixer.y." in said(folder)


def test_truncated_files_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "model.safetensors: damaged or truncated" in said(saved)
    path.write_bytes(bytes(range(256)) * 10)
    assert "damaged" in said(saved)
    path.unlink()
    assert "model.safetensors: this shard is missing" in said(saved)


def test_a_broken_index_is_named(saved: Path) -> None:
    index = saved / "model.safetensors.index.json"
    for content in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": [1]}}'):
        index.write_text(content)
        assert "model.safetensors.index.json" in said(saved)
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    assert "../elsewhere.safetensors" in said(saved)
    index.write_text('{"weight_map": {"a": "\\ud800"}}')
    assert "damaged" in said(saved)
    index.write_text("[" * 99999)
    assert "not a shard index" in said(saved)
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "gone.safetensors: this shard is missing" in said(saved)


def test_a_newer_format_says_upgrade(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"squamata_format": VERSION + 1}))
    assert f"format {VERSION + 1}" in said(saved) and "upgrade" in said(saved)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'"x"', b"\xff\xfe", b"{", b'{"squamata_format": null}', b"[" * 99999]
)
def test_garbage_instead_of_config_json(content: bytes, saved: Path) -> None:
    (saved / "config.json").write_bytes(content)
    assert "config.json" in said(saved)


CONFIG_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version-word": lambda config: config.update(squamata_format="two"),
    "version-list": lambda config: config.update(squamata_format=[1]),
    "no-model": lambda config: config.pop("model"),
    "model-list": lambda config: config.update(model=[1, 2]),
    "model-word": lambda config: config.update(model="mamba"),
    "model-key": lambda config: config["model"].update(d_modle=3),
    "model-value": lambda config: config["model"].update(d_model="wide"),
    "model-negative": lambda config: config["model"].update(d_model=-8),
    "no-limit": lambda config: config["model"].pop("time_step_limit"),
    "no-groups": lambda config: config["model"].update(n_groups=0),
    "negative-groups": lambda config: config["model"].update(n_groups=-2),
    "no-state": lambda config: config["model"].update(d_state=0),
    "no-taps": lambda config: config["model"].update(d_conv=0),
    "no-chunk": lambda config: config["model"].update(chunk_size=0),
    "head-dim": lambda config: config["model"].update(head_dim=7),
    "head-dim-zero": lambda config: config["model"].update(head_dim=0),
    "unknown-block": lambda config: config["model"].update(blocks=["mamba2", "mamba9"]),
    "no-blocks": lambda config: config["model"].update(blocks=[]),
    "countless-blocks": lambda config: config["model"].update(blocks=["mamba2"] * 10**6),
    "fewer-blocks": lambda config: config["model"].update(blocks=["mamba2"]),
    "no-quantization": lambda config: config.pop("quantization_config"),
    "null-quantization": lambda config: config.update(quantization_config=None),
    "no-recipe": lambda config: config["quantization_config"].pop("recipe"),
    "recipe-list": lambda config: config["quantization_config"].update(recipe=[1]),
    "recipe-key": lambda config: config["quantization_config"]["recipe"].update(rulez=[]),
    "recipe-rules": lambda config: config["quantization_config"]["recipe"].update(rules=[{"site": "head.in"}]),
    "other-transform": lambda config: config["quantization_config"]["recipe"].update(transforms=[]),
}


@pytest.mark.parametrize("case", list(CONFIG_CHANGES))
def test_every_wrong_entry_of_config_json_is_one_line(case: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    CONFIG_CHANGES[case](config)
    (saved / "config.json").write_text(json.dumps(config))
    line = said(saved)
    assert "validation error" not in line and "object is not" not in line
    assert "config.json" in line or case in ("fewer-blocks", "other-transform")  # of which tensors tell


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    assert "no config.json" in said(tmp_path)
    (tmp_path / "config.json").mkdir()
    assert "config.json" in said(tmp_path)
