"""The folder of a study: rows.jsonl that only grows, details of each row beside it, and a Parquet copy at the end.

A row is written by one process, in one write that is flushed to the disk before the next begins, after its details:
whatever kills the process, rows that were written are whole, and a torn last line counts for nothing.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import UnitSums

ROWS, PARQUET, STUDY, DETAILS, LOCK = "rows.jsonl", "rows.parquet", "study.json", "details", ".lock"

Arrays = dict[str, np.ndarray]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder made, and held against other writers; the system lets go of it when the process dies."""
    try:
        (folder / DETAILS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise SquamataError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise SquamataError(
            f"{folder}: another run is writing to it; wait for its end or choose another --out"
        ) from None
    finally:
        os.close(descriptor)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every whole row, in the order written; SquamataError for a whole line that is no row."""
    path = folder / ROWS
    if not path.is_file():
        return []
    rows = []
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["id"]
        except (ValueError, KeyError, TypeError):
            raise SquamataError(f"{path}, line {number}: not a row of a study; remove the line") from None
        rows.append(row)
    return rows


def append_row(folder: Path, row: Mapping[str, Any], details: Arrays) -> None:
    """Write a row's details, then the row; both are on the disk when this returns. Needs ``locked``."""
    _write_details(folder / DETAILS / f"{row['id']}.npz", details)
    path = folder / ROWS
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # what a killed process left of a row
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _write_details(path: Path, details: Arrays) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **details)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_details(folder: Path, row_id: str) -> Arrays:
    """A row's arrays; none if the file is not there."""
    path = folder / DETAILS / f"{row_id}.npz"
    if not path.is_file():
        return {}
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def pack_sums(place: int, sums: UnitSums) -> Arrays:
    """The losses of every document (or window), as arrays of a row's details; ``place``: which evaluation."""
    parts = {"tokens": sums.tokens, "nats": sums.nats, "kl": sums.kl, "agrees": sums.agrees}
    kept = {f"sums.{place}.{name}": part for name, part in parts.items() if part is not None}
    return kept | {f"sums.{place}.{sums.kind}": np.zeros(0)}


def unpack_sums(details: Arrays, place: int = 0) -> UnitSums | None:
    """What ``pack_sums`` packed, or None."""
    prefix = f"sums.{place}."
    found = {name.removeprefix(prefix): array for name, array in details.items() if name.startswith(prefix)}
    if "tokens" not in found:
        return None
    kind = "windows" if "windows" in found else "documents"
    return UnitSums(kind, found["tokens"], found["nats"], found.get("kl"), found.get("agrees"))


@dataclass(frozen=True)
class Planned:
    """A row that a study asks for, measured or not. ``asked``: the (recipe, override) that it is the row of; ``error``:
    why the last run could not measure it."""

    id: str
    name: str
    model: str
    seed: int
    asked: Sequence[Sequence[str]]
    error: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Planned:
        """The plan that a written row was of."""
        asked = (row["recipe"], row["override"])
        name = f"{row['model']}, {', '.join(asked)}, seed {row['seed']}"
        return cls(row["id"], name, row["model"], row["seed"], (asked,))


def write_plan(folder: Path, study: Mapping[str, Any], planned: Sequence[Planned]) -> None:
    """Which study the folder is of, and which rows, in order, it has now."""
    partial = folder / f"{STUDY}.partial"
    partial.write_text(json.dumps({"study": dict(study), "rows": [asdict(row) for row in planned]}, indent=1) + "\n")
    partial.replace(folder / STUDY)


def write_traceback(folder: Path, row_id: str, text: str | None) -> str | None:
    """Keep what went wrong with a row where nobody foresaw it, and say in which file of the folder; None takes away
    what an earlier run kept."""
    name = f"{DETAILS}/{row_id}.traceback.txt"
    if text is None:
        (folder / name).unlink(missing_ok=True)
        return None
    (folder / name).write_text(text)
    return name


def read_plan(folder: Path) -> tuple[dict[str, Any], list[Planned]]:
    """The study of a folder, empty if it has none, and the rows that it asks for."""
    path = folder / STUDY
    if not path.is_file():
        return {}, []
    try:
        content = json.loads(path.read_text())
        study, rows = dict(content["study"]), list(content["rows"])
        if rows and isinstance(rows[0], str):
            rows = list(_planned_before(folder, rows))
        return study, [Planned(**row) for row in rows]
    except (ValueError, KeyError, TypeError, OSError):
        raise SquamataError(f"{path}: not the file of a study; run the study again") from None


def _planned_before(folder: Path, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is known of the rows of a file that says their ids alone, as all did until 2026-11-23."""
    written = {row["id"]: row for row in read_rows(folder)}
    for name in ids:
        yield asdict(Planned.of(written[name]) if name in written else Planned(name, name, "", 0, ()))


def read_study(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The study of a folder, empty if it has none, and those of its rows that are written, in the study's order."""
    study, planned = read_plan(folder)
    rows = {row["id"]: row for row in read_rows(folder)} if planned else {}
    return study, [rows[row.id] for row in planned if row.id in rows]


def write_parquet(folder: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """The rows as a flat table, columns with dots for what is nested, lists as JSON; False without pyarrow."""
    if importlib.util.find_spec("pyarrow") is None or not rows:
        return False
    import pyarrow
    from pyarrow import parquet

    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    table = pyarrow.Table.from_pydict({name: [row.get(name) for row in flat] for name in columns})
    partial = folder / f"{PARQUET}.partial"
    parquet.write_table(table, partial)
    partial.replace(folder / PARQUET)
    return True


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping) and key != "resolved_recipe":
            flat |= _flat(entry, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(entry) if isinstance(entry, list | tuple | Mapping) else entry
    return flat
