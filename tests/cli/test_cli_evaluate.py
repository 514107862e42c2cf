"""``squamata evaluate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import squamata
from squamata.evaluate import evaluate_lambada, evaluate_task

TEXT = (
    "The snake is a reptile. It has no legs and lives in the forest, where it eats mice, frogs and small birds.\n" * 3
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[start:]}) + "\n" for start in (0, 4, 20)))
    return path


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
def test_numbers_are_those_of_the_function(
    succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path], text: Path, mode: str
) -> None:
    folder = shipped("mamba2", "w4a16")
    options = ("--against", "bundled", "--window", 16, "--max-tokens", 40, "--mode", mode)
    found = succeed("evaluate", folder, "--text", text, *options)
    expected = squamata.evaluate(
        squamata.load(folder), text, against=squamata.load("bundled"), window=16, max_tokens=40, mode=mode
    ).to_dict()
    del expected["seconds"]
    assert found["by_position"] == json.loads(json.dumps(expected.pop("by_position")))
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value) if isinstance(value, float | tuple) else value), name
    assert found["kl"] > 0 and 0 < found["top1_agreement"] <= 1 and found["tokens"] == 40
    assert (found["recipe"], found["against"], found["text"]) == ("w4a16", "bundled", str(text))


def test_lambada_and_tasks(succeed: Callable[..., dict[str, Any]], command: Callable[..., Any], tmp_path: Path) -> None:
    lambada = tmp_path / "lambada.jsonl"
    rows = [{"context": "The snake is a reptile. A frog is no", "continuation": "reptile"}] * 3
    lambada.write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"query": "The sky is", "choices": ["blue", "zxqj"], "gold": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(question) + "\n" + json.dumps(question | {"gold": 1}) + "\n")
    found = succeed("evaluate", "bundled", "--lambada", lambada, "--tasks", "piqa", "--data", tmp_path, "--limit", 2)
    model = squamata.load("bundled")
    expected = evaluate_lambada(model, lambada, limit=2)
    assert found["lambada"]["perplexity"] == pytest.approx(expected.perplexity)
    assert (found["lambada"]["accuracy"], found["lambada"]["examples"]) == (expected.accuracy, 2)
    assert found["tasks"]["piqa"]["accuracy"] == evaluate_task(model, "piqa", tmp_path).accuracy == 0.5
    assert "perplexity" not in found
    assert "50.00" in command("evaluate", "bundled", "--tasks", "piqa", "--data", tmp_path).out


def test_figures_that_are_found_are_not_lost_by_what_follows(
    command: Callable[..., Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "lambada.jsonl").write_text(json.dumps({"context": "The", "continuation": "sky"}) + "\n")
    monkeypatch.setattr(sys.modules["squamata.evaluate"], "evaluate_lambada", interrupted)
    numbers = tmp_path / "numbers.json"
    judged = ("--text", text, "--lambada", tmp_path / "lambada.jsonl", "--json", numbers)
    assert command("evaluate", "bundled", *judged).status == 130
    assert json.loads(numbers.read_text())["perplexity"] > 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", "", "no text"),
        ("short.txt", "a", "shorter than 2 tokens"),
        ("text.md", "text", ".txt file or a .jsonl"),
        ("torn.jsonl", '{"text": "fine"}\n{"text": \n', "line 2"),
        ("wrong.jsonl", '{"txt": "no such field"}\n', "no field 'text'; it has 'txt'"),
        ("list.jsonl", "[1]\n", "not an object"),
    ],
)
def test_bad_texts(refuse: Callable[..., str], tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    numbers = tmp_path / "numbers.json"
    assert said in refuse("evaluate", "bundled", "--text", tmp_path / name, "--json", numbers)
    assert not numbers.exists()


def test_other_bad_input(refuse: Callable[..., str], text: Path, tmp_path: Path, tiny_mamba1: Path) -> None:
    assert "--text" in refuse("evaluate", "bundled")
    assert "--data" in refuse("evaluate", "bundled", "--tasks", "piqa")
    assert "names none" in refuse("evaluate", "bundled", "--tasks", " ,", "--data", tmp_path)
    assert "no such folder" in refuse("evaluate", tmp_path / "nothing", "--text", text)
    assert "no such folder" in refuse("evaluate", "bundled", "--against", "./nothing", "--text", text)
    assert "window" in refuse("evaluate", "bundled", "--text", text, "--window", 0)
    assert "no such file" in refuse("evaluate", "bundled", "--tasks", "piqa", "--data", tmp_path)
    for idle in (("--against", "bundled"), ("--max-tokens", 9), ("--data", tmp_path)):
        line = refuse("evaluate", "bundled", "--lambada", text, *idle)
        assert line.startswith(f"{idle[0]} is of --") and "leave it out" in line
    assert refuse("evaluate", "bundled", "--text", text, "--limit", 3).startswith("--limit is of --tasks")
    judged = ("evaluate", "bundled", "--text", text)  # refused before the text is judged, whose figures would be lost
    assert "no field 'context'" in refuse(*judged, "--lambada", text)
    assert "did you mean 'piqa'" in refuse(*judged, "--tasks", "pica", "--data", tmp_path)
