"""Run a study: plan its rows, skip those that are written, measure the rest, write each as it is ready."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squamata.report.measure import Outcome
from squamata.report.plan import Places, RowPlan, Study, plan_rows
from squamata.report.rows import (
    Planned,
    append_row,
    locked,
    read_rows,
    read_study,
    write_parquet,
    write_plan,
    write_traceback,
)
from squamata.report.verbs import Verbs
from squamata.report.workers import Workforce, measure_all

ALONE = Workforce()
SCRATCH = ".squamata-scratch"  # checkpoints while they are judged; emptied, so no folder that a user may have


@dataclass(frozen=True)
class StudyRun:
    """What a run did: the study's ``rows`` in its order, how many of them this run measured, one line a failure, and
    notes on what the grid leaves out."""

    rows: list[dict[str, Any]]
    measured: int
    failures: list[str]
    notes: list[str]


def run_study(
    study: Study,
    places: Places,
    out: Path,
    verbs: Verbs,
    force: Workforce = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> StudyRun:
    """Measure the rows of a study that ``out`` does not have yet. SquamataError before any work if a row cannot run.

    A run that was killed goes on where it was, and only the rows in flight are measured again. Rows that fail are
    tried again by the next run.
    """
    plans, notes = plan_rows(study, places, verbs)
    described = study.model_dump(mode="json")
    with locked(out):
        write_plan(out, described, _planned(plans))
        finished = {row["id"] for row in read_rows(out)}
        waiting = [plan for plan in plans if plan.id not in finished]
        scratch = out / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir()
        failures: dict[str, str] = {}
        try:
            for number, outcome in enumerate(measure_all(waiting, verbs, force, scratch), start=1):
                failure = _keep(out, outcome)
                if failure is not None:
                    failures[outcome.plan.id] = failure
                    write_plan(out, described, _planned(plans, failures))
                if progress is not None:
                    progress(len(plans) - len(waiting) + number, len(plans))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        rows = read_study(out)[1]
        write_parquet(out, rows)
    return StudyRun(rows, len(waiting) - len(failures), list(failures.values()), notes)


def _keep(out: Path, outcome: Outcome) -> str | None:
    """Write a row, or say in one line why there is none."""
    told = write_traceback(out, outcome.plan.id, outcome.traceback)
    if outcome.error is None:
        append_row(out, outcome.row, outcome.details)
        return None
    return outcome.error if told is None else f"{outcome.error} (traceback: {told})"


def _planned(plans: Sequence[RowPlan], failures: Mapping[str, str] | None = None) -> list[Planned]:
    failures = failures or {}
    return [
        Planned(plan.id, plan.name, plan.labels["model"], plan.seed, plan.asked, failures.get(plan.id))
        for plan in plans
    ]
