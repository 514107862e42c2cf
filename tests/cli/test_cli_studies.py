"""``squamata study run``, ``report``, ``sensitivity`` and ``outliers``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from squamata.load.hub import bundled

EXCERPT = bundled() / "excerpt.jsonl"
QUICK = ("--max-tokens", 64, "--window", 16, "--samples", 2, "--length", 32)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    content = {"name": "quick", "models": "bundled", "recipes": ["float", "w4a16"], "text": "excerpt.jsonl"}
    path.write_text(yaml.safe_dump(content | {"max_tokens": 64, "window": 16}))
    return path


def test_from_a_study_to_a_page(
    succeed: Callable[..., dict[str, Any]], command: Callable[..., Any], study: Path, tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    out, page = tmp_path / "out", tmp_path / "page.html"
    found = succeed("study", "run", study, "--out", out, "--data", EXCERPT.parent)
    assert (found["study"], found["measured"], found["failures"]) == ("quick", 2, [])
    assert [row["recipe"] for row in found["rows"]] == ["float", "w4a16"] and found["rows"][0]["kl"] == 0
    again = command("study", "run", study, "--out", out, "--data", EXCERPT.parent)
    assert "0 rows measured now, 2 in" in again.err and "baseline" in again.out and "w4a16" in again.out
    reported = succeed("report", out, "--out", page)
    assert reported["bytes"] == page.stat().st_size > 1e6
    assert reported["rows"][0]["verdict"] == "baseline"


def test_sensitivity_ranks_and_searches(succeed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    options = ("--recipe", "w4a16", "--per", "layer", "--budget-bits", 8.5, "--save-recipe", recipe)
    found = succeed("sensitivity", "bundled", "--text", EXCERPT, *QUICK, *options)
    assert found["kind"] == "sensitivity" and found["model"] == "bundled" and len(found["rows"]) == 8
    assert [mixture["name"] for mixture in found["search"]["mixtures"]][1:3] == ["greedy", "evolution"]
    made = succeed("quantize", "bundled", "--recipe", recipe, "--out", tmp_path / "made")
    best = next(some for some in found["search"]["mixtures"] if some["name"] == found["search"]["best"])
    assert made["bytes_quantized"] == pytest.approx(best["bytes"], rel=0.01)
    assert made["bytes_quantized"] <= found["search"]["budget_bytes"]


def test_outliers(succeed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    options = ("--sites", "*.mixer.x", "--max-tokens", 64, "--window", 16, "--out", page)
    found = succeed("outliers", "bundled", "--text", EXCERPT, *options)
    assert found["kind"] == "outliers" and len(found["rows"]) == 8 and page.stat().st_size > 1e6


def test_what_is_refused(refuse: Callable[..., str], study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such file" in refuse("study", "run", tmp_path / "none.yaml", "--out", out)
    assert "--data FOLDER" in refuse("study", "run", study, "--out", out)
    assert "--workers" in refuse("study", "run", study, "--out", out, "--workers", 0)
    if not torch.cuda.is_available():
        sees_none = "torch sees no GPU here"
        assert sees_none in refuse("study", "run", study, "--out", out, "--device", "cuda")
        assert sees_none in refuse("sensitivity", "bundled", "--text", EXCERPT, "--device", "cuda")
        assert sees_none in refuse("evaluate", "bundled", "--text", EXCERPT, "--device", "cuda")
    study.write_text(study.read_text().replace("recipes", "recipies"))
    assert "did you mean 'recipes'" in refuse("study", "run", study, "--out", out, "--data", EXCERPT.parent)
    assert not out.exists()
    assert "no such folder" in refuse("report", tmp_path / "none", "--out", tmp_path / "x.html")
    assert "holds no rows" in refuse("report", tmp_path, "--out", tmp_path / "x.html")
    assert "quantizes nothing" in refuse("sensitivity", "bundled", "--text", EXCERPT, "--recipe", "float")
    budgets = ("--budget-bits", 4, "--budget-bytes", 5)
    assert "two budgets" in refuse("sensitivity", "bundled", "--text", EXCERPT, *budgets)
    assert "two budgets" in refuse("sensitivity", "bundled", "--text", EXCERPT, "--budget-ms", 1, "--budget-mj", 1)
    chip = ("--budget-ms", 1, "--chip", "h20")
    assert "did you mean 'h200'" in refuse("sensitivity", "bundled", "--text", EXCERPT, *chip)
    assert "needs a budget" in refuse("sensitivity", "bundled", "--text", EXCERPT, "--save-recipe", tmp_path / "r.yaml")
    assert "--judge needs a budget" in refuse("sensitivity", "bundled", "--text", EXCERPT, "--judge", EXCERPT)
    unwritable = ("--budget-bits", 9, "--save-recipe", tmp_path / "none" / "r.yaml")
    assert "--save-recipe" in refuse("sensitivity", "bundled", "--text", EXCERPT, *unwritable)
    too_little = ("--recipe", "w4a16", "--budget-bits", 1)
    assert "raise it" in refuse("sensitivity", "bundled", "--text", EXCERPT, *too_little)  # and nothing measured
    assert "no such file" in refuse("outliers", "bundled", "--text", tmp_path / "none.txt")


def test_study_alone_shows_what_it_can_do(command: Callable[..., Any]) -> None:
    outcome = command("study")
    assert (outcome.status, outcome.err) == (0, "") and "run" in outcome.out


def test_a_ray_cluster_that_is_not_there_is_one_line(command: Callable[..., Any], study: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the library 'ray' is not installed")
    options = ("--data", EXCERPT.parent, "--out", tmp_path / "out", "--ray", "localhost:1")
    outcome = command("study", "run", study, *options)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "no cluster answers there" in outcome.err
