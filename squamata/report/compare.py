"""Rows beside rows: paired differences over the same documents, and the words for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import expm1
from pathlib import Path
from typing import Any, Literal

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import PairedDifference, UnitSums, difference_of_sums
from squamata.evaluate.uncertainty import FEWEST_UNITS, Interval, ratio_interval
from squamata.report.accuracy import accuracy_difference
from squamata.report.plan import AS_IT_IS
from squamata.report.rows import Planned, read_details, read_plan, unpack_sums

Row = Mapping[str, Any]
Measure = Literal["nats", "kl"]

SMALLEST_KL = 1e-9  # below it lies only float noise


@dataclass(frozen=True)
class Comparison:
    """A row beside its baseline: ``words`` for a person, ``difference`` None for the baseline itself; ``percent``: the
    change of perplexity or KL in percent of the baseline's, and its interval if there is one."""

    words: str
    difference: PairedDifference | None = None
    percent: tuple[float, Interval | None] | None = None

    @property
    def verdict(self) -> str:
        """better, worse, not significant, or nothing."""
        return self.difference.verdict if self.difference else ""


def verdicts(
    folder: Path, study: Mapping[str, Any], rows: Sequence[Row], place: int = 0, measure: Measure = "nats"
) -> dict[str, Comparison]:
    """Row id -> how its perplexity (or KL) stands beside that of its baseline, in evaluation ``place`` (the first: of
    the first text in the first mode)."""
    sums = sums_of(folder, rows, place)
    return _compared(folder, study, rows, lambda name, baseline: _beside(sums[name], sums[baseline], measure))


def task_verdicts(folder: Path, study: Mapping[str, Any], rows: Sequence[Row], task: str) -> dict[str, Comparison]:
    """Row id -> how its accuracy at a task stands beside that of its baseline."""
    details = {row["id"]: read_details(folder, row["id"]) for row in rows}

    def beside(name: str, baseline: str) -> Comparison:
        difference = accuracy_difference(details[baseline], details[name], task)
        if difference is None:
            return Comparison("not comparable")
        return Comparison(f"{100 * difference.nats_per_token:+z.2f} points, {difference.verdict}", difference)

    return _compared(folder, study, rows, beside)


def _compared(
    folder: Path, study: Mapping[str, Any], rows: Sequence[Row], beside: Callable[[str, str], Comparison]
) -> dict[str, Comparison]:
    """Row id -> ``beside(row id, baseline's id)`` where both are measured."""
    planned = read_plan(folder)[1] or [Planned.of(row) for row in rows]
    measured = {row["id"] for row in rows}
    found = {}
    for row in rows:
        baseline = baseline_of(row, planned, study.get("baseline")).id
        if row["id"] == baseline:
            found[baseline] = Comparison("baseline")
        elif baseline not in measured:
            found[row["id"]] = Comparison("its baseline is not measured")
        else:
            found[row["id"]] = beside(row["id"], baseline)
    return found


def sums_of(folder: Path, rows: Sequence[Row], place: int = 0) -> dict[str, UnitSums | None]:
    """Row id -> losses of the documents in evaluation ``place``."""
    return {row["id"]: unpack_sums(read_details(folder, row["id"]), place) for row in rows}


def baseline_of(row: Row, planned: Sequence[Planned], wanted: Mapping[str, Any] | None) -> Planned:
    """The row that this one is compared with, measured or not: the study's baseline for the same model and seed; the
    model's first row if there is none (its recipe is not for this model, or the study names no baseline). An override
    that is not for the baseline's recipe leaves that as it is."""
    same_model = [other for other in planned if other.model == row["model"]]
    if wanted is not None:
        for name in (wanted.get("override"), AS_IT_IS):
            for other in same_model:
                if other.seed == row["seed"] and any(_is_meant(asked, wanted["recipe"], name) for asked in other.asked):
                    return other
    return same_model[0]


def _is_meant(asked: Sequence[str], recipe: str, override: str | None) -> bool:
    return asked[0] == recipe and override in (None, asked[1])


def _beside(own: UnitSums | None, base: UnitSums | None, measure: Measure) -> Comparison:
    difference = paired(base, own, measure)
    if difference is None:
        return Comparison("not comparable")
    percent = _percent(difference, base, own, measure)
    if percent is None:  # beside float all KL is more
        return Comparison("", difference)
    digits = 2 if measure == "nats" else 1 if abs(percent[0]) < 10 else 0
    change = f"{percent[0]:+z,.{digits}f} %"
    return Comparison(f"{change}, {difference.verdict}{_if_few(own)}", difference, percent)


def _percent(
    found: PairedDifference, base: UnitSums | None, other: UnitSums | None, measure: Measure
) -> tuple[float, Interval | None] | None:
    """Of perplexity, or of the baseline's KL unless that is nothing but float's noise. The interval of KL's ratio is of
    the same resamples as that of the difference, so both say the same of zero."""
    if measure == "nats":
        return 100 * expm1(found.nats_per_token), found.ci and (100 * expm1(found.ci[0]), 100 * expm1(found.ci[1]))
    assert base is not None and other is not None and base.kl is not None and other.kl is not None
    if base.kl.sum() / base.tokens.sum() <= SMALLEST_KL:
        return None
    bounds = ratio_interval(other.kl, base.kl)
    change = 100 * (float(other.kl.sum() / base.kl.sum()) - 1)
    return change, bounds and (100 * (bounds[0] - 1), 100 * (bounds[1] - 1))


def _if_few(sums: UnitSums | None) -> str:
    """How many units there are, if they are too few for any difference to be significant."""
    count = FEWEST_UNITS if sums is None else len(sums.tokens)
    if sums is None or count >= FEWEST_UNITS:
        return ""
    return f" ({count} {sums.kind.removesuffix('s') if count == 1 else sums.kind})"


def paired(first: UnitSums | None, second: UnitSums | None, measure: Measure = "nats") -> PairedDifference | None:
    """The paired difference, or None if the two were not judged on the same documents."""
    if first is None or second is None:
        return None
    try:
        return difference_of_sums(first, second, measure)
    except SquamataError:
        return None
