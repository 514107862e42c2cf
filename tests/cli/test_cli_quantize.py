"""``squamata quantize``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from squamata.parts import QuantizedParts

SMALL = ("--samples", 2, "--length", 24)


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors, from the files alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_numbers_are_those_of_the_files_and_bundled_brings_its_calibration(
    succeed: Callable[..., dict[str, Any]], tmp_path: Path, bundled_folder: Path, bundled_calibration: Path
) -> None:
    out = tmp_path / "made" / "out"
    found = succeed("quantize", "bundled", "--recipe", "w8a8", *SMALL, "--seed", 5, "--out", out)
    assert found["recipe"] == "w8a8" and found["architecture"] == "mamba2" and found["out"] == str(out)
    assert found["bytes_float"] == stored_bytes(bundled_folder)
    assert found["bytes_quantized"] == stored_bytes(out)
    assert 0 < found["seconds"] < 600 and found["peak_rss_bytes"] > found["bytes_float"]
    calibration = found["calibration"]
    assert (calibration["samples"], calibration["tokens"], calibration["seed"]) == (2, 48, 5)
    assert calibration["sha256"] == hashlib.sha256(bundled_calibration.read_bytes()).hexdigest()
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["recipe"]["name"] == "w8a8" and stored["seed"] == 5


def test_force_replaces_a_checkpoint(
    command: Callable[..., Any], shipped: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(shipped("mamba2", "w4a16"), out)
    outcome = command("quantize", "bundled", "-r", "float", "-o", out, "--force")
    assert (outcome.status, outcome.err) == (0, "") and "1.000" in outcome.out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]["name"] == "float"


def test_an_existing_folder_stays(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "--force" in refuse("quantize", "bundled", "-r", "w4a16", "-o", tmp_path / "out")


TEXTS = {
    "empty.txt": "",
    "blank.jsonl": '{"text": "  "}\n',
    "short.txt": "a",
    "torn.jsonl": '{"text": "fine"}\n{"text": \n',
    "wrong.jsonl": '{"txt": "no such field"}\n',
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.txt", "no such file"),
        ("empty.txt", "no text"),
        ("blank.jsonl", "no text"),
        ("torn.jsonl", "line 2"),
        ("wrong.jsonl", "no field 'text'; it has 'txt'"),
    ],
)
def test_bad_calibration_leaves_nothing(refuse: Callable[..., str], tmp_path: Path, name: str, said: str) -> None:
    if name in TEXTS:
        (tmp_path / name).write_text(TEXTS[name])
    out = tmp_path / "out"
    line = refuse("quantize", "bundled", "-r", "w8a8", "--calibration", tmp_path / name, "-o", out, *SMALL)
    assert said in line and name in line
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_a_missing_calibration_file_is_refused_by_every_recipe(
    refuse: Callable[..., str], tmp_path: Path, recipe: str
) -> None:
    line = refuse("quantize", "bundled", "-r", recipe, "--calibration", tmp_path / "none.txt", "-o", tmp_path / "out")
    assert "no such file" in line


def test_other_bad_input(refuse: Callable[..., str], tmp_path: Path, bundled_folder: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "bad.yaml").write_text("name: bad\nrules:\n  - {site: '*.mixer.u', spec: float, layer: [1]}\n")
    assert "did you mean 'w8a8'" in refuse("quantize", "bundled", "-r", "w8a9", "-o", out)
    assert "did you mean 'layers'" in refuse("quantize", "bundled", "-r", tmp_path / "bad.yaml", "-o", out)
    assert "no such folder" in refuse("quantize", tmp_path / "nothing", "-r", "w4a16", "-o", out)
    assert "no config.json" in refuse("quantize", tmp_path, "-r", "w4a16", "-o", out)
    assert "--calibration" in refuse("quantize", bundled_folder, "-r", "w8a8", "-o", out)
    assert not out.exists()


def test_a_checkpoint_cannot_be_quantized_again(
    refuse: Callable[..., str], shipped: Callable[[str, str], Path], tmp_path: Path
) -> None:
    line = refuse("quantize", shipped("mamba2", "w4a16"), "-r", "w4a16", "-o", tmp_path / "out")
    assert "float model" in line


def test_an_interrupted_run_says_how_it_goes_on(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(self: QuantizedParts, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    arguments = ("quantize", "bundled", "-r", "w4a16", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(QuantizedParts, "tell", interrupt)
        outcome = command(*arguments)
    assert outcome.status == 130 and "the same command with --resume goes on" in outcome.err
    again = command(*arguments)
    assert again.status == 2 and "finished 2 parts" in again.err and again.err.count("\n") == 1
    resumed = command(*arguments, "--resume")
    assert resumed.status == 0 and "after 2 parts that an interrupted run had finished" in resumed.out


def test_parts_that_nobody_wants_are_thrown_away_when_told(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: QuantizedParts, done: int) -> None:
        raise MemoryError

    arguments = ("quantize", "bundled", "-r", "w4a16", "-o", tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(QuantizedParts, "tell", fail)
        command(*arguments)
    assert "finished 1 part of it" in command(*arguments).err  # whatever has ended the run
    assert "resumed" not in command(*arguments, "--no-resume").out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_less_text_than_asked_for_is_said(command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The snake is a reptile without legs. " * 20)
    drawn = ("--calibration", tmp_path / "short.txt", "--samples", 9, "--length", 64)
    outcome = command("quantize", "bundled", "-r", "w8a8", "-o", tmp_path / "out", *drawn)
    assert outcome.status == 0 and "the text holds no more, 9 were asked for" in outcome.out


def test_an_interruption_before_anything_is_made_is_one_line(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("squamata.pipeline.quantize", interrupt)
    outcome = command("quantize", "bundled", "-r", "w4a16", "-o", tmp_path / "new" / "out")
    assert outcome.status == 130 and outcome.err.split() == ["squamata:", "interrupted"]
