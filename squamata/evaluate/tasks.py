"""Multiple-choice tasks from local JSONL files: the choice the model finds likeliest, against the gold answer.

Two forms of lines: ``{query, choices, gold}``, where the choices answer one prompt, and
``{context_options, continuation, gold}``, where the choices are prompts of one continuation (Trinh & Le 2018).
Each task has a file in ``tasks/`` that says the same to lm-eval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squamata.errors import SquamataError, nearest
from squamata.evaluate.result import Result
from squamata.evaluate.scoring import Score, read_examples, request, score
from squamata.evaluate.uncertainty import mean_and_error
from squamata.evaluate.windows import Progress, tokenizer_of

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel


@dataclass(frozen=True)
class Question:
    """(context, continuation) of every choice, the lengths that normalize them, and the index of the right one."""

    texts: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...] | None
    gold: int


def _answers_of_one_prompt(row: dict[str, Any]) -> Question:
    prompt = row["query"].rstrip() + "\nAnswer:"
    choices = row["choices"]
    return Question(tuple((prompt, f" {choice}") for choice in choices), tuple(map(len, choices)), row["gold"])


def _prompts_of_one_answer(row: dict[str, Any]) -> Question:
    answer = f" {row['continuation']}"
    return Question(tuple((context, answer) for context in row["context_options"]), None, row["gold"])


@dataclass(frozen=True)
class _Form:
    fields: dict[str, type]
    choices: str
    question: Callable[[dict[str, Any]], Question]


_ANSWERS = _Form({"query": str, "choices": list, "gold": int}, "choices", _answers_of_one_prompt)
_PROMPTS = _Form({"context_options": list, "continuation": str, "gold": int}, "context_options", _prompts_of_one_answer)

TASKS = {"arc_easy": _ANSWERS, "piqa": _ANSWERS, "winogrande": _PROMPTS}


@dataclass(frozen=True)
class TaskResult(Result):
    """``accuracy``: share of questions whose likeliest choice is the gold one; ``accuracy_norm`` with nats divided by
    the choice's characters (None where all choices have one continuation). ``predictions``, and whether each is right
    (``hits``): per question.
    """

    task: str
    accuracy: float
    accuracy_stderr: float | None
    accuracy_norm: float | None
    accuracy_norm_stderr: float | None
    examples: int
    seconds: float
    predictions: tuple[int, ...] = field(repr=False, compare=False)
    hits: tuple[bool, ...] = field(repr=False, compare=False)


def evaluate_task(
    model: LanguageModel, task: str, folder: str | Path, limit: int | None = None, progress: Progress | None = None
) -> TaskResult:
    """Judge a model on ``folder/TASK.jsonl``, its first ``limit`` questions.

    SquamataError for an unknown task, a missing file, or a line whose gold answer is none of its choices.
    """
    started = time.perf_counter()
    tokenizer = tokenizer_of(model)
    questions = read_questions(task, folder, limit)
    requests = [request(tokenizer, *text) for question in questions for text in question.texts]
    scores = iter(score(model, requests, progress))
    grouped = [[next(scores) for _ in question.texts] for question in questions]
    chosen = [_likeliest(some, [1] * len(some)) for some in grouped]
    hits = _hits(chosen, questions)
    accuracy, error = mean_and_error(hits)
    accuracy_norm, norm_error = None, None
    if all(question.lengths for question in questions):
        normed = [_likeliest(some, question.lengths or ()) for some, question in zip(grouped, questions, strict=True)]
        accuracy_norm, norm_error = mean_and_error(_hits(normed, questions))
    seconds = time.perf_counter() - started
    found = (accuracy, error, accuracy_norm, norm_error, len(questions), seconds)
    return TaskResult(task, *found, tuple(chosen), hits)


def read_questions(task: str, folder: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a task, checked."""
    if task not in TASKS:
        raise SquamataError(f"no task '{task}'{nearest(task, TASKS)}")
    form, path = TASKS[task], Path(folder) / f"{task}.jsonl"
    rows = read_examples(path, form.fields, limit)
    for number, row in enumerate(rows, start=1):
        choices = row[form.choices]
        if not choices or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise SquamataError(f"{path}, question {number}: '{form.choices}' must be texts that are not blank")
        if not 0 <= row["gold"] < len(choices):
            raise SquamataError(f"{path}, question {number}: gold {row['gold']} is none of {len(choices)} choices")
    return [form.question(row) for row in rows]


def _likeliest(scores: Sequence[Score], lengths: Sequence[int]) -> int:
    return min(range(len(scores)), key=lambda choice: scores[choice].nats / lengths[choice])


def _hits(chosen: Sequence[int], questions: Sequence[Question]) -> tuple[bool, ...]:
    return tuple(choice == question.gold for choice, question in zip(chosen, questions, strict=True))


def check_tasks(names: Sequence[str], folder: str | Path, limit: int | None = None) -> None:
    """Refuse, before any work is done, a task whose file is missing or wrong, or that only lm-eval may know if it is
    not installed."""
    for name in names:
        if name in TASKS:
            read_questions(name, folder, limit)
        elif find_spec("lm_eval") is None:
            raise SquamataError(
                f"no task '{name}'{nearest(name, TASKS)}; lm-eval, which knows others, is not installed: "
                "pip install 'squamata[eval]'"
            )


def evaluate_with_lm_eval(
    model: LanguageModel,
    tasks: Sequence[str],
    folder: str | Path,
    generate: Callable[..., Any],
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Judge a model with lm-eval: task -> metric -> value (``acc``, ``acc_stderr``, ``acc_norm``, ...).

    ``tasks``: those of ``tasks/*.yaml``, which read ``folder``, or any name lm-eval knows (those it downloads).
    ``generate``: ``squamata.generate``, handed in because judging does not know running. SquamataError if lm-eval is
    not installed, for a task that nobody knows, and for a missing data file.
    """
    if find_spec("lm_eval") is None:
        raise SquamataError("lm-eval is not installed: pip install 'squamata[eval]'")
    from squamata.evaluate.lm_eval_adapter import run_tasks

    return run_tasks(model, tasks, folder, generate, limit)
