"""Rows beside rows: paired differences over the same documents, and the words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import PairedDifference, UnitSums, difference_of_sums
from squamata.evaluate.uncertainty import FEWEST_UNITS
from squamata.report.plan import AS_IT_IS
from squamata.report.rows import Planned, read_details, read_plan, unpack_sums

Row = Mapping[str, Any]
Measure = Literal["nats", "kl"]


@dataclass(frozen=True)
class Comparison:
    """A row beside its baseline: ``words`` for a person, ``difference`` None for the baseline itself."""

    words: str
    difference: PairedDifference | None = None


def verdicts(folder: Path, study: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Comparison]:
    """Row id -> how its perplexity stands beside that of its baseline, on the first text in the first mode."""
    sums, planned = sums_of(folder, rows), read_plan(folder)[1] or [Planned.of(row) for row in rows]
    return {row["id"]: _beside(row, baseline_of(row, planned, study.get("baseline")), sums) for row in rows}


def sums_of(folder: Path, rows: Sequence[Row]) -> dict[str, UnitSums | None]:
    """Row id -> losses of the documents in the first evaluation."""
    return {row["id"]: unpack_sums(read_details(folder, row["id"])) for row in rows}


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


def _beside(row: Row, baseline: Planned, sums: Mapping[str, UnitSums | None]) -> Comparison:
    if row["id"] == baseline.id:
        return Comparison("baseline")
    if baseline.id not in sums:
        return Comparison("its baseline is not measured")
    difference = paired(sums[baseline.id], sums[row["id"]])
    if difference is None:
        return Comparison("not comparable")
    change = f"{100 * (difference.perplexity_ratio - 1):+.2f} %"
    return Comparison(f"{change}, {difference.verdict}{_if_few(sums[row['id']])}", difference)


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
