"""``squamata recipes``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from squamata.spec.recipe import Recipe, recipe_names


def test_list_names_every_recipe(command: Callable[..., Any], succeed: Callable[..., dict[str, Any]]) -> None:
    shown = command("recipes", "list").out
    assert all(f"{name} " in shown for name in recipe_names())
    assert [entry["name"] for entry in succeed("recipes", "list")["recipes"]] == recipe_names()
    assert command("recipes").out == shown


@pytest.mark.parametrize("name", recipe_names())
def test_what_show_prints_is_the_recipe(command: Callable[..., Any], name: str) -> None:
    printed = yaml.safe_load(command("recipes", "show", name).out)
    assert Recipe.from_mapping(printed) == Recipe.read(name)


def test_show_says_what_lands_where(
    succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path], command: Callable[..., Any]
) -> None:
    expected = {site: spec.describe() for site, spec in Recipe.read("quamba-w8a8").resolve(("mamba2",) * 8).items()}
    for where in ("8", "bundled", shipped("mamba2", "w4a16")):
        found = succeed("recipes", "show", "quamba-w8a8", "--sites", where)
        assert found["sites"]["mamba2"] == expected
    lines = command("recipes", "show", "quamba-w8a8", "--sites", "3").out.splitlines()
    row = next(line for line in lines if line.startswith("mixer.u "))
    assert row.split() == ["mixer.u", "activation", "int8", "per", "tensor,", "percentile(alpha=0.9999)", "0-2"]


def test_check_accepts_and_counts(succeed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rule = '{site: "*.mixer.in", spec: {bits: 8}, layers: [0, 4]}'
    path.write_text(f"name: mine\narchitectures: [mamba2]\nrules:\n  - {rule}\n")
    assert succeed("recipes", "check", path) == {"recipe": "mine", "layers": 5, "formats": {"mamba2": {"int8": 2}}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nrulez: []\n", "did you mean 'rules'"),
        ("name: a\nrules:\n  - {site: '*.mixer.u', spec: {bits: 8, symetric: true}}\n", "did you mean 'symmetric'"),
        ("name: a\nrules:\n  - {site: '*.mixer.foo', spec: {bits: 8}}\n", "no site matches"),
        ("name: a\nrules:\n  - {site: '*.mixer.in', spec: {bits: 8, granularity: channel}}\n", "cannot run"),
        ("name: a\nrules:\n  - {site: '*.mixer.in', spec: {bits: 8, scale: minmaks}}\n", "did you mean 'minmax'"),
        ("name: a\ntransforms: [hadamar]\n", "did you mean 'hadamard'"),
        ("name: a\nweights: rtm\n", "did you mean 'rtn'"),
        ("- not a mapping\n", "mapping"),
        ("name: [\n", "YAML"),
    ],
)
def test_check_refuses(refuse: Callable[..., str], tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert said in refuse("recipes", "check", path)


def test_unknown_names(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "did you mean 'quamba-w8a8'" in refuse("recipes", "show", "quamba-w8a")
    assert "no such recipe file" in refuse("recipes", "show", tmp_path / "none.yaml")
    assert "1 to 1000" in refuse("recipes", "show", "w8a8", "--sites", "0")
    assert "no such folder" in refuse("recipes", "show", "w8a8", "--sites", "./nowhere")
