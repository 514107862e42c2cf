"""``squamata inspect``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from squamata.load.tokenizer import Tokenizer

TEXT = "The snake lives in the forest."


def test_rows_hold_what_the_file_holds(
    succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path]
) -> None:
    folder = shipped("mamba2", "quamba-w8a8")
    stored = load_file(folder / "model.safetensors")
    found = succeed("inspect", folder)
    rows = {row["site"]: row for row in found["sites"]}
    assert sum(row["bytes"] for row in rows.values()) == sum(tensor.nbytes for tensor in stored.values())
    assert found["bytes"]["total"] == sum(tensor.nbytes for tensor in stored.values())
    for name, row in rows.items():
        scale = stored.get(f"{name}.scale")
        if scale is not None:
            assert row["scales"] == scale.numel() and row["bits"] == 8, name
            assert (row["scale_min"], row["scale_max"]) == (float(scale.min()), float(scale.max())), name
    row = rows["layers.3.mixer.u"]
    assert (row["layer"], row["kind"], row["format"], row["granularity"]) == (3, "activation", "int8", "tensor")
    assert row["strategy"] == "percentile(alpha=0.9999)" and row["scale_median"] == row["scale_max"]
    assert rows["layers.0.mixer.y"]["bits"] is None and rows["layers.0.norm.weight"]["format"] == "float32"
    assert found["provenance"]["seed"] == 1 and found["provenance"]["calibration"]["samples"] == 4
    assert found["recipe"]["name"] == "quamba-w8a8"


def test_tables(command: Callable[..., Any], shipped: Callable[[str, str], Path]) -> None:
    folder = shipped("mamba2", "w4a16")
    together = command("inspect", folder).out
    row = next(line for line in together.splitlines() if line.startswith("mixer.in_proj.weight"))
    assert row.split()[1:6] == ["0-7", "int4", "per", "group(128)", "minmax"]
    assert "recipe w4a16" in together and "no calibration" in together
    one = command("inspect", folder, "--layer", 7).out
    assert "embedding.weight" not in one and "mixer.in_proj.weight" in one
    assert "bfloat16" in command("inspect", "bundled").out


def test_clipped_fraction_is_the_fraction_beyond_the_codes(
    succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The input of the first layer worked out by hand: embedding rows, RMS norm, scale."""
    folder = tmp_path / "narrow"
    shutil.copytree(shipped("mamba2", "w8a8"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mixer.in.scale"] = scale = tensors["layers.0.mixer.in.scale"] / 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    rows = {row["site"]: row for row in succeed("inspect", folder, "--text", tmp_path / "text.txt")["sites"]}
    ids = torch.tensor(Tokenizer.read(folder).encode(TEXT)[:-1])
    h = tensors["embedding.weight"][ids].float() * tensors["embedding.weight.scale"][ids, None]
    normed = h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * tensors["layers.0.norm.weight"].float()
    expected = ((normed / scale).round().abs() > 127).double().mean()
    assert expected > 0.005
    assert rows["layers.0.mixer.in"]["clipped"] == pytest.approx(float(expected))
    others = [
        row["clipped"] for row in rows.values() if row["site"] != "layers.0.mixer.in" and row["clipped"] is not None
    ]
    assert all(0 <= share <= 0.05 for share in others) and any(others)
    assert rows["layers.0.mixer.in_proj.weight"]["clipped"] is None


def test_differences_come_largest_first(
    succeed: Callable[..., dict[str, Any]],
    command: Callable[..., Any],
    shipped: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    first, second = shipped("mamba2", "quamba-w8a8"), tmp_path / "second"
    shutil.copytree(first, second)
    tensors = load_file(second / "model.safetensors")
    tensors["layers.2.mixer.u.scale"] *= 2
    tensors["layers.5.mixer.B.scale"] /= 3
    tensors["layers.1.mixer.D"][0] ^= 1
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    found = succeed("inspect", first, "--against", second)["differences"]
    assert [row["site"] for row in found] == ["layers.5.mixer.B", "layers.2.mixer.u", "layers.1.mixer.D"]
    assert [row["scale_ratio"] for row in found] == pytest.approx([1 / 3, 2, 1])
    assert found[2]["relative_difference"] > 0 and found[0]["relative_difference"] is None
    assert [row["site"] for row in succeed("inspect", first, "--against", second, "--layer", 2)["differences"]] == [
        "layers.2.mixer.u"
    ]
    assert "0 of" in command("inspect", first, "--against", first).out


def test_another_recipe_differs_in_format(
    succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path]
) -> None:
    rows = succeed("inspect", shipped("mamba2", "w4a16"), "--against", shipped("mamba2", "quamba-w8a8-tied"))[
        "differences"
    ]
    by_site = {row["site"]: row for row in rows}
    assert (by_site["layers.0.mixer.u"]["first"], by_site["layers.0.mixer.rotation"]["first"]) == ("float", "absent")
    weight = by_site["layers.0.mixer.in_proj.weight"]
    assert weight["first"] == "int4 per group(128), minmax" and 0 < weight["relative_difference"] < 0.3


def test_bad_input(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"squamata_format": 1}))
    assert "no such folder" in refuse("inspect", tmp_path / "nothing")
    assert "config.json" in refuse("inspect", tmp_path)
    assert "no such file" in refuse("inspect", "bundled", "--text", tmp_path / "none.txt")
    assert "layers 0 to 7" in refuse("inspect", "bundled", "--layer", 8)
