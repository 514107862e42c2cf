"""``squamata profile`` and ``squamata demo``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import config_of

from squamata.cli import demo
from squamata.cli.gpu_profile import spread
from squamata.evaluate import profile as profile_module
from squamata.models import lm
from squamata.models.config import SHAPES, parameter_shapes
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites

QUICK = ("--prompt", 8, "--generate", 3, "--repeats", 2)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "_BANDWIDTH_BYTES", 2**22)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "mamba2-130m", config_of("mamba2", tie_embeddings=False))


def test_numbers_of_a_checkpoint(succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path]) -> None:
    folder = shipped("mamba2", "w4a16")
    found = succeed("profile", folder, *QUICK, "--batch", 2, "--threads", 1)
    sizes = found["bytes"]
    stored = load_file(folder / "model.safetensors")
    layers = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("layers."))
    assert (sizes["layers"], sizes["embedding"]) == (layers, stored["embedding.weight"].nbytes)
    assert sizes["total"] == sum(tensor.nbytes for tensor in stored.values())
    assert (sizes["head"], sizes["sites"]) == (0, 0)
    assert sizes["cache"] == 2 * 8 * 4 * (8 * 64 * 128 + 3 * (512 + 2 * 128))  # B, layers, float32: state, convolution
    for times in (found["ttft_ms"], found["tpot_ms"], found["ttlt_ms"]):
        assert 0 < times["min"] <= times["median"] <= times["max"]
    assert found["ttlt_ms"]["max"] > found["ttft_ms"]["min"] + 2 * found["tpot_ms"]["min"] - 1e-6
    assert found["prefill_tokens_per_s"] == pytest.approx(2 * 8 * 1e3 / found["ttft_ms"]["median"])
    assert found["decode_tokens_per_s"] == pytest.approx(2 * 1e3 / found["tpot_ms"]["median"])
    assert found["peak_rss_bytes"] >= found["rss_bytes"] > sizes["total"]
    assert found["floor_ms"] == pytest.approx(1e3 * found["weight_bytes_per_token"] / found["dram_read_bytes_per_s"])
    assert found["floor_share"] == pytest.approx(found["floor_ms"] / found["tpot_ms"]["median"])
    for part in ("layer", "token"):
        assert found["agreement"][f"{part}_error"] <= found["agreement"][f"{part}_tolerance"]
    settings = {name: found[name] for name in ("batch", "prompt", "generate", "repeats", "threads", "device", "recipe")}
    assert settings == {
        "batch": 2, "prompt": 8, "generate": 3, "repeats": 2, "threads": 1, "device": "cpu", "recipe": "w4a16",
    }  # fmt: skip


def test_a_shape_has_random_weights_of_its_size(succeed: Callable[..., dict[str, Any]], tiny_shape: None) -> None:
    shapes = parameter_shapes(SHAPES["mamba2-130m"])
    elements = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    found = succeed("profile", "--shape", "mamba2-130m", *QUICK)
    assert found["bytes"]["total"] == 4 * sum(elements.values())
    assert found["weight_bytes_per_token"] == 4 * (sum(elements.values()) - elements["embedding.weight"])
    assert (found["shape"], found["model"], found["recipe"]) == ("mamba2-130m", None, "float")


def test_a_shape_is_quantized_in_memory(succeed: Callable[..., dict[str, Any]], tiny_shape: None) -> None:
    found = succeed("profile", "--shape", "mamba2-130m", "--recipe", "quamba-w8a8", *QUICK)
    vocabulary, width = 61, 32
    assert found["bytes"]["embedding"] == found["bytes"]["head"] == vocabulary * width + 4 * vocabulary
    specs, infos = Recipe.read("quamba-w8a8").resolve(("mamba2",) * 2), all_sites(("mamba2",) * 2)
    static = [site for site, spec in specs.items() if infos[site].kind in ("activation", "state") and not spec.dynamic]
    assert found["bytes"]["sites"] == 4 * len(static)
    assert found["recipe"] == "quamba-w8a8"


def test_nothing_is_timed_if_kernels_are_wrong(
    refuse: Callable[..., str], tiny_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = lm.LanguageModel.forward
    calls = []

    def wrong(self: lm.LanguageModel, *arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(arguments)
        return honest(self, *arguments, **named) + (0.3 if len(calls) == 1 else 0.0)

    monkeypatch.setattr(lm.LanguageModel, "forward", wrong)
    assert "disagree with the reference" in refuse("profile", "--shape", "mamba2-130m", *QUICK)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "either"),
        (("bundled", "--shape", "mamba-130m"), "either"),
        (("bundled", "--recipe", "w8a8"), "--shape"),
        (("--shape", "mamba-131m"), "did you mean 'mamba-130m'"),
        (("--shape", "mamba-130m", "--recipe", "w8a9"), "did you mean 'w8a8'"),
        (("./nowhere",), "no such folder"),
        (("bundled", "--threads", "0"), "threads must be 1 to"),
        (("bundled", "--generate", "1"), "generate must be at least 2"),
        (("bundled", "--prompt", "0"), "prompt must be at least 1"),
        (("bundled", "--device", "cuda", "--threads", "1"), "leave it out"),
    ],
)
def test_bad_input(refuse: Callable[..., str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refuse("profile", *arguments)


def test_a_gpu_is_refused(refuse: Callable[..., str]) -> None:
    assert "--device cpu" in refuse("profile", "bundled", "--device", "cuda")


def test_demo_tells_the_story(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKENS": 128, "CALIBRATION": (4, 64), "NEW_TOKENS": 4, "TIMED": (8, 3, 1)}.items():
        monkeypatch.setattr(demo, name, value)
    out, numbers = tmp_path / "demo", tmp_path / "numbers.json"
    outcome = command("demo", "--out", out, "--json", numbers)
    assert outcome.status == 0, outcome.err
    found = json.loads(numbers.read_text())
    by_name = {row["name"]: row for row in found["models"]}
    assert list(by_name) == ["float", "quamba-w8a8", "w4a16"]
    assert by_name["float"]["kl"] is None
    assert 0 < by_name["quamba-w8a8"]["kl"] < by_name["w4a16"]["kl"] < 0.2
    for name in ("quamba-w8a8", "w4a16"):
        stored = load_file(out / name / "model.safetensors")
        assert by_name[name]["bytes"]["total"] == sum(tensor.nbytes for tensor in stored.values())
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for users in (None, "what a user keeps here"):  # is not replaced
        (out / demo.NOTE).unlink() if users is None else (out / demo.NOTE).write_text(users)
        again = command("demo", "--out", out)
        assert again.status == 2 and "choose another --out" in again.err
    assert (out / demo.NOTE).read_text() == "what a user keeps here"
    assert all(name in outcome.out for name in by_name) and "demo.png" in outcome.out


def test_the_spread_of_times() -> None:
    assert spread([float(time) for time in range(1, 22)]) == {"median": 11, "min": 1, "max": 21, "p10": 3, "p90": 19}
    assert set(spread([2.0]).values()) == {2.0}
