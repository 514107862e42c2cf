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
from squamata.report.rows import read_details, unpack_sums

Row = Mapping[str, Any]
Measure = Literal["nats", "kl"]


@dataclass(frozen=True)
class Comparison:
    """A row beside its baseline: ``words`` for a person, ``difference`` None for the baseline itself."""

    words: str
    difference: PairedDifference | None = None


def verdicts(folder: Path, study: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Comparison]:
    """Row id -> how its perplexity stands beside that of its baseline, on the first text in the first mode."""
    sums = sums_of(folder, rows)
    return {row["id"]: _beside(row, baseline_of(row, rows, study.get("baseline")), sums) for row in rows}


def sums_of(folder: Path, rows: Sequence[Row]) -> dict[str, UnitSums | None]:
    """Row id -> losses of the documents in the first evaluation."""
    return {row["id"]: unpack_sums(read_details(folder, row["id"])) for row in rows}


def baseline_of(row: Row, rows: Sequence[Row], wanted: Mapping[str, Any] | None) -> Row:
    """The row that this one is compared with: the study's baseline for the same model and seed, else the model's
    first row. An override that leaves the baseline's recipe as it is names the row that is called so."""
    same_model = [other for other in rows if other["model"] == row["model"]]
    if wanted is not None:
        own = [other for other in same_model if (other["seed"], other["recipe"]) == (row["seed"], wanted["recipe"])]
        for name in (wanted.get("override"), AS_IT_IS):
            for other in own:
                if name in (None, other["override"]):
                    return other
    return same_model[0]


def _beside(row: Row, baseline: Row, sums: Mapping[str, UnitSums | None]) -> Comparison:
    if row["id"] == baseline["id"]:
        return Comparison("baseline")
    difference = paired(sums[baseline["id"]], sums[row["id"]])
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
