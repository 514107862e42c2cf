"""Tasks in a study: the verbs' own figures, paired beside the baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import squamata
from squamata.errors import SquamataError
from squamata.evaluate import evaluate_lambada, evaluate_task
from squamata.report.accuracy import accuracy_difference
from squamata.report.compare import task_verdicts
from squamata.report.page import write_page
from squamata.report.plan import Places, Study, plan_rows
from squamata.report.rows import read_details
from squamata.report.study import run_study
from squamata.report.verbs import Verbs

Write = Callable[..., Path]
WORDS = ("snake", "river", "forest", "water", "stone", "light", "house", "child")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    passages = [
        {"context": f"The {a} and the {b} and the {a} and the", "continuation": b} for a in WORDS for b in WORDS
    ]
    (tmp_path / "lambada_openai.jsonl").write_text("\n".join(map(json.dumps, passages)))
    questions = [{"query": f"A {a}?", "choices": [a, f"no {a}"], "gold": n % 2} for n, a in enumerate(WORDS)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return tmp_path


def test_a_studys_rows_have_the_verbs_accuracies(write_study: Write, verbs: Verbs, data: Path) -> None:
    study = data / "excerpt.jsonl"
    study.write_text(json.dumps({"text": "The snake sheds its skin, and grows another. " * 4}))
    path = write_study(
        recipes=["float", "w4a16"], text="excerpt.jsonl", tasks=["lambada_openai", "piqa"], task_limit=20
    )
    done = run_study(Study.read(path), Places(path, data=data), data / "out", verbs)
    squamata.quantize("bundled", "w4a16", data / "made")
    model = squamata.load(data / "made")
    ours = evaluate_lambada(model, data / "lambada_openai.jsonl", 20)
    row = done.rows[1]
    assert row["tasks"]["lambada_openai"]["accuracy"] == ours.accuracy
    assert row["tasks"]["lambada_openai"]["perplexity"] == pytest.approx(ours.perplexity)
    choices = evaluate_task(model, "piqa", data, 20)
    assert row["tasks"]["piqa"]["accuracy"] == choices.accuracy and row["tasks"]["piqa"]["examples"] == 8
    hits = read_details(data / "out", row["id"])
    np.testing.assert_array_equal(hits["hits.lambada_openai"], ours.hits)
    np.testing.assert_array_equal(hits["hits.piqa"], choices.hits)
    assert np.mean(choices.hits) == choices.accuracy
    found = task_verdicts(data / "out", {}, done.rows, "lambada_openai")
    assert found[done.rows[0]["id"]].words == "baseline" and "points, " in found[row["id"]].words
    write_page(data / "page.html", "tasks", {}, done.rows, [], data / "out")
    assert "lambada_openai, % of 20" in (data / "page.html").read_text()


def test_a_paired_difference_of_accuracies() -> None:
    """Forty more of four hundred right, none lost: by hand 10 points, with the standard error of the differences."""
    first = np.arange(400) < 100
    second = np.arange(400) < 140
    found = accuracy_difference({"hits.t": first}, {"hits.t": second}, "t")
    assert found is not None and found.verdict == "better" and found.nats_per_token == pytest.approx(0.1)
    half = 1.96 * np.sqrt(0.1 * 0.9 / 400)
    assert found.ci == (pytest.approx(0.1 - half, abs=4e-3), pytest.approx(0.1 + half, abs=4e-3))
    back = accuracy_difference({"hits.t": second}, {"hits.t": first}, "t")
    assert back is not None and back.verdict == "worse"
    same = accuracy_difference({"hits.t": first}, {"hits.t": first}, "t")
    assert same is not None and same.verdict == "not significant"
    assert accuracy_difference({"hits.t": first}, {}, "t") is None
    assert accuracy_difference({"hits.t": first}, {"hits.t": first[:9]}, "t") is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": ["lambada"]}, "no task 'lambada' (did you mean 'lambada_openai'?)"),
        ({"tasks": ["winogrande"]}, "no such file"),
        ({"tasks": ["arc_easy"]}, "gold 5 is none of 2 choices"),
    ],
)
def test_bad_tasks_are_refused_before_any_work(
    write_study: Write, verbs: Verbs, data: Path, fields: dict[str, Any], said: str
) -> None:
    (data / "arc_easy.jsonl").write_text(json.dumps({"query": "A?", "choices": ["a", "b"], "gold": 5}))
    (data / "t.jsonl").write_text(json.dumps({"text": "one text that is long enough"}))
    path = write_study(text="t.jsonl", **fields)
    with pytest.raises(SquamataError) as caught:
        plan_rows(Study.read(path), Places(path, data=data), verbs)
    assert said in str(caught.value)


def test_tasks_are_part_of_a_rows_id_and_leave_others_as_they_were(
    write_study: Write, verbs: Verbs, data: Path
) -> None:
    (data / "t.jsonl").write_text(json.dumps({"text": "one text that is long enough"}))

    def ids(**fields: Any) -> list[str]:
        path = write_study(text="t.jsonl", recipes=["float"], **fields)
        return [row.id for row in plan_rows(Study.read(path), Places(path, data=data), verbs)[0]]

    assert len({*ids(), *ids(tasks=["piqa"]), *ids(tasks=["piqa"], task_limit=3)}) == 3
    assert ids() == ids(task_limit=3)
