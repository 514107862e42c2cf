"""``squamata evaluate``: how good a model is, and how far from another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squamata.cli.output import (
    Device,
    JsonFile,
    check_files,
    check_json,
    counted,
    interval,
    progress,
    table,
    write_json,
)
from squamata.errors import SquamataError

if TYPE_CHECKING:
    from squamata.evaluate import Evaluation
    from squamata.models.lm import LanguageModel


class EvaluationMode(StrEnum):
    """How windows run: in one pass, or token by token through the (quantized) state."""

    parallel = "parallel"
    recurrent = "recurrent"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name, or 'bundled'.")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help=".txt, or .jsonl with a 'text' field.")] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Adds KL and agreement with it.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window; each starts from a fresh state.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Judge on the first so many tokens only.")] = None,
    mode: Annotated[EvaluationMode, typer.Option(help="One pass, or token by token.")] = EvaluationMode.parallel,
    lambada: Annotated[Path | None, typer.Option(metavar="FILE", help="Last words: {context, continuation}.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="arc_easy,piqa,winogrande; any other name goes to lm-eval, if installed."),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Holds TASK.jsonl of the tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="First so many examples of LAMBADA and of each task.")] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also show how it changes with the distance from a window's start.")
    ] = False,
    device: Annotated[Device, typer.Option(help="cpu: the integer kernels; cuda: simulated.")] = Device.cpu,
    json_file: JsonFile = None,
) -> None:
    """Judge a model: perplexity of a text, KL and agreement with another model, LAMBADA, multiple-choice tasks."""
    check_json(json_file)
    if text is None and lambada is None and tasks is None:
        raise SquamataError("nothing to judge by: give --text FILE (or --lambada FILE, or --tasks NAMES)")
    if tasks is not None and data is None:
        raise SquamataError("--tasks needs --data FOLDER, the folder that holds their JSONL files")
    of_text = {"against": against, "max_tokens": max_tokens, "by_position": by_position or None}
    _refuse_idle_options(text, lambada, tasks, **of_text, data=data, limit=limit)
    names = list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))
    if tasks is not None and not names:
        raise SquamataError("--tasks names none: give some, as in arc_easy,piqa")
    check_files(text)
    from squamata import pipeline
    from squamata.evaluate.lambada import read_passages
    from squamata.evaluate.tasks import check_tasks
    from squamata.run.device import check_device
    from squamata.run.simulated import placed

    check_device(device.value)
    if lambada is not None:
        read_passages(lambada, limit)
    if data is not None:
        check_tasks(names, data, limit)
    loaded = placed(pipeline.load(model), device.value)
    found: dict[str, Any] = {"model": model, "recipe": loaded.checkpoint.recipe.name, "device": device.value}
    if text is not None:
        reference = None if against is None else placed(pipeline.load(against), device.value)
        with progress(f"perplexity, {mode.value}") as advance:
            result = pipeline.evaluate(loaded, text, reference, window, max_tokens, mode.value, progress=advance)
        found |= result.to_dict() | {"against": against, "text": text}
        _show(model, text, against, result)
        if by_position:
            _show_positions(result)
        write_json(json_file, found)  # whatever becomes of the rest
    if lambada is not None:
        found["lambada"] = _lambada(loaded, lambada, limit)
        write_json(json_file, found)
    if tasks is not None and data is not None:
        found["tasks"] = _tasks(loaded, names, data, limit)
        write_json(json_file, found)


def _refuse_idle_options(text: object, lambada: object, tasks: object, **given: object) -> None:
    """SquamataError for an option that would change nothing of what was asked for."""
    judged_by = {
        "data": ("--tasks NAMES", tasks is None),
        "limit": ("--tasks NAMES or --lambada FILE", tasks is None and lambada is None),
    }
    for name in (name for name, value in given.items() if value is not None):
        others, idle = judged_by.get(name, ("--text FILE", text is None))
        if idle:
            raise SquamataError(f"--{name.replace('_', '-')} is of {others}: give one, or leave it out")


def _show(model: str, text: Path, against: str | None, result: Evaluation) -> None:
    rows: list[tuple[object, ...]] = [
        ("perplexity a token", f"{result.perplexity:.3f}", interval(result.perplexity_ci, 3)),
        ("bits per byte", f"{result.bits_per_byte:.4f}", ""),
    ]
    if result.kl is not None and result.top1_agreement is not None:
        rows += [
            ("KL, nats a token", f"{result.kl:.5f}", interval(result.kl_ci, 5)),
            ("top-1 agreement", f"{result.top1_agreement:.4f}", interval(result.top1_agreement_ci, 4)),
        ]
    beside = f", against {against}" if against else ""
    judged = f"{counted(result.tokens, 'token')} of {counted(result.documents, 'document')}"
    where = f"{judged}, windows of {result.window}, {result.mode}"
    table(f"{model} on {text.name}{beside}\n{where}, {result.seconds:.1f} s", ("<", "value", "95 % interval"), rows)


def _show_positions(result: Evaluation) -> None:
    rows = []
    for span in result.by_position:
        compared = () if span.kl is None else (f"{span.kl:.5f}", interval(span.kl_ci, 5))
        loss = (f"{span.nats_per_token:.4f}", interval(span.nats_ci, 4))
        rows.append((f"{span.start} to {span.stop - 1}", span.tokens, *loss, *compared))
    heads = ("<place in the window", "tokens", "nats a token", "95 % interval")
    table("by position", heads if result.kl is None else (*heads, "KL, nats a token", "95 % interval"), rows)


def _lambada(model: LanguageModel, path: Path, limit: int | None) -> dict[str, Any]:
    from squamata.evaluate import evaluate_lambada

    with progress("LAMBADA") as advance:
        result = evaluate_lambada(model, path, limit, advance)
    table(
        f"LAMBADA, {counted(result.examples, 'passage')}, {result.seconds:.1f} s",
        ("accuracy, %", "standard error", "perplexity a word"),
        [(_percent(result.accuracy), _percent(result.accuracy_stderr), f"{result.perplexity:.2f}")],
    )
    return result.to_dict()


def _tasks(model: LanguageModel, names: list[str], folder: Path, limit: int | None) -> dict[str, Any]:
    """Our own scorer for the tasks it knows, lm-eval for the others."""
    from squamata import pipeline
    from squamata.evaluate import TASKS, evaluate_task, evaluate_with_lm_eval

    found: dict[str, Any] = {}
    for name in names:
        if name in TASKS:
            with progress(name) as advance:
                found[name] = evaluate_task(model, name, folder, limit, advance).to_dict()
    others = [name for name in names if name not in TASKS]
    if others:
        metrics = evaluate_with_lm_eval(model, others, folder, pipeline.generate, limit)
        found |= {
            name: {"accuracy": some.get("acc"), "accuracy_stderr": some.get("acc_stderr"), "lm_eval": some}
            for name, some in metrics.items()
        }
    table(
        f"tasks of {folder}",
        ("<task", "accuracy, %", "standard error", "by length, %", "examples"),
        [
            (
                name,
                _percent(some["accuracy"]),
                _percent(some["accuracy_stderr"]),
                _percent(some.get("accuracy_norm")),
                some.get("examples"),
            )
            for name, some in found.items()
        ],
    )
    return found


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
