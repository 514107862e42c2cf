"""``squamata study run``: a grid of recipes -> rows that survive whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from squamata.cli.output import (
    Device,
    JsonFile,
    check_files,
    check_folders,
    check_json,
    counted,
    interval,
    note,
    progress,
    size,
    table,
    write_json,
)
from squamata.errors import SquamataError
from squamata.models.config import ModelConfig
from squamata.spec.recipe import Recipe

app = typer.Typer(invoke_without_command=True, help="Run a grid of models and recipes, and go on where it stopped.")


@app.callback()
def study(context: typer.Context) -> None:
    """Run a grid of models and recipes, and go on where it stopped."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("run")
def run(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="models, recipes, overrides, seeds, text ...")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Rows go here; run again to go on.")],
    workers: Annotated[int, typer.Option(help="Processes, of one thread each if there are several.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Measure on this Ray cluster ('auto': the one here).")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="cpu: the integer kernels; cuda: simulated, workers on GPUs in turn.")
    ] = Device.cpu,
    models: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the study's relative paths of models start.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the study's relative paths of texts start.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure every row of a study that DIR does not have yet; killed at any time, it goes on when run again."""
    check_json(json_file)
    check_files(file)
    check_folders(models, data)
    if workers < 1:
        raise SquamataError(f"--workers must be at least 1, not {workers}")
    from squamata.report.plan import Places, Study
    from squamata.report.study import run_study
    from squamata.report.workers import Workforce
    from squamata.run.device import check_device

    if ray is None:
        check_device(device.value)
    force = Workforce(workers, ray, device.value)
    study = Study.read(file)
    with progress(f"study {study.name}") as advance:
        done = run_study(study, Places(file, models, data), out, verbs(), force, advance)
    for line in done.notes:
        note(line)
    if done.rows:
        show_rows(study.model_dump(mode="json"), done.rows, out)
        if any("simulation" in row for row in done.rows):
            note(simulation_line(done.rows))
        there = f"{counted(done.measured, 'row')} measured now, {len(done.rows)} in {out}"
        note(f"{there}; next: squamata report {out} --out report.html")
    write_json(
        json_file,
        {"study": study.name, "out": out, "measured": done.measured, "failures": done.failures, "rows": done.rows},
    )
    if done.failures:
        more = f" (and {counted(len(done.failures) - 1, 'more row')})" if len(done.failures) > 1 else ""
        raise SquamataError(f"{done.failures[0]}{more}; the other rows are kept")


def simulation_line(rows: list[dict[str, Any]]) -> str:
    """Whether simulation gave what integers give: rows of before this was looked at do not say."""
    compared = [row["simulation"]["largest_difference"] for row in rows if "simulation" in row]
    apart = sum(difference > 0 for difference in compared)
    said = "exactly" if not apart else f"not in {apart} of them (logits by {max(compared):.1e} at most)"
    return f"simulation equals integers (reference kernels) in {counted(len(compared), 'row')} compared: {said}"


def verbs() -> Any:
    """The pipeline's verbs, for the rooms that may not import it."""
    from squamata import pipeline
    from squamata.report.verbs import Verbs

    return Verbs(pipeline.quantize, pipeline.load, pipeline.evaluate, pipeline.check, chip_figures)


def chip_figures(config: ModelConfig, recipe: Recipe) -> dict[str, float]:
    """Costs on the default technology, as columns of a study."""
    from squamata.hardware import estimate

    found = estimate(config, recipe)
    figures = ["energy_per_token_nj", "dram_bytes_per_token"]
    if not any(named.name == "reorder_within" for named in recipe.transforms):  # whose groups no recipe tells
        figures.insert(0, "sram_mm2")
    return {name: float(getattr(found, name)) for name in figures}


def show_rows(study: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """A line a row: size, perplexity and KL of the first evaluation, and whether it differs from the baseline."""
    from squamata.report.accuracy import tasks_of
    from squamata.report.compare import task_verdicts, verdicts

    against = verdicts(folder, study, rows)
    tasks = {name: task_verdicts(folder, study, rows, name) for name in tasks_of(rows)}
    lines = []
    for row in rows:
        first, compared = row["evaluations"][0], against[row["id"]]
        lines.append(
            (
                row["model"],
                row["recipe"],
                row["override"],
                row["seed"],
                size(row["bytes"]["total"]),
                f"{row['perplexity']:.3f}",
                interval(first["perplexity_ci"], 3),
                "" if row["kl"] is None else f"{row['kl']:.5f}",
                interval(first["kl_ci"], 5),
                compared.words,
                *(_accuracy(row, name, found[row["id"]].words) for name, found in tasks.items()),
            )
        )
    columns = (
        "<model",
        "<recipe",
        "<override",
        "seed",
        "bytes",
        "perplexity",
        "95 %",
        "KL",
        "95 %",
        "<perplexity beside\nthe baseline",
        *(f"<{name}, %" for name in tasks),
    )
    table(f"{study.get('name', '')}: {counted(len(rows), 'row')}", columns, lines)


def _accuracy(row: dict[str, Any], task: str, words: str) -> str:
    found = row.get("tasks", {}).get(task)
    return "" if found is None else f"{100 * found['accuracy']:.2f} ({words})"
