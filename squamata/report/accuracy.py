"""Tasks as part of a study: a row's accuracies, and how they stand beside those of its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from squamata.evaluate.lambada import LambadaResult, evaluate_lambada, read_passages
from squamata.evaluate.perplexity import PairedDifference, UnitSums, difference_of_sums
from squamata.evaluate.tasks import TaskResult, evaluate_task, read_questions
from squamata.models.lm import LanguageModel
from squamata.report.rows import Arrays

LAMBADA = "lambada_openai"


def read_task(name: str, path: str, limit: int | None) -> None:
    """Refuse, before any work is done, a file that the task cannot be read from."""
    if name == LAMBADA:
        read_passages(path, limit)
    else:
        read_questions(name, Path(path).parent, limit)


def measure_tasks(
    model: LanguageModel, tasks: Mapping[str, str], limit: int | None
) -> tuple[dict[str, dict[str, Any]], Arrays]:
    """Task -> its figures, and which examples were right, by the task's file."""
    figures: dict[str, dict[str, Any]] = {}
    details: Arrays = {}
    for name, path in tasks.items():
        found: LambadaResult | TaskResult
        if name == LAMBADA:
            found = evaluate_lambada(model, path, limit)
        else:
            found = evaluate_task(model, name, Path(path).parent, limit)
        figures[name] = found.to_dict()
        details[f"hits.{name}"] = np.array(found.hits)
    return figures, details


def accuracy_difference(first: Arrays, second: Arrays, name: str) -> PairedDifference | None:
    """Share of examples that the second has right more than the first, the same examples resampled; None if they were
    not judged on as many. Verdicts are of the second: better if it has more of them right."""
    one, other = first.get(f"hits.{name}"), second.get(f"hits.{name}")
    if one is None or other is None or len(one) != len(other):
        return None
    ones = np.ones(len(one))
    before, after = (UnitSums("examples", ones, 1.0 - hits) for hits in (one, other))
    found = difference_of_sums(before, after)
    bounds = None if found.ci is None else (-found.ci[1], -found.ci[0])
    return PairedDifference(-found.nats_per_token, bounds, found.verdict)


def tasks_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every task that a row has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.get("tasks", ())))
