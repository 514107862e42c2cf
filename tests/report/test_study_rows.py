"""Rows survive: torn lines, second writers, round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import UnitSums
from squamata.report import rows as rows_module
from squamata.report.rows import (
    Planned,
    append_row,
    locked,
    pack_sums,
    read_details,
    read_plan,
    read_rows,
    read_study,
    unpack_sums,
    write_parquet,
    write_plan,
)


def test_a_torn_last_line_counts_for_nothing_and_is_cut_off(tmp_path: Path) -> None:
    with locked(tmp_path):
        append_row(tmp_path, {"id": "a", "value": 1.5}, {"x": np.arange(3)})
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"id": "b", "val')  # a process died here
        assert [row["id"] for row in read_rows(tmp_path)] == ["a"]
        append_row(tmp_path, {"id": "c"}, {})
    assert read_rows(tmp_path) == [{"id": "a", "value": 1.5}, {"id": "c"}]
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert np.array_equal(read_details(tmp_path, "a")["x"], np.arange(3)) and read_details(tmp_path, "z") == {}


def test_a_whole_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n{"value": 1}\n')
    with pytest.raises(SquamataError, match=r"rows\.jsonl, line 2"):
        read_rows(tmp_path)


def test_details_are_there_before_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two writes, the row is missing and is measured again; never a row without its details."""

    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    with locked(tmp_path):
        monkeypatch.setattr(rows_module, "_sync_folder", die)
        with pytest.raises(KeyboardInterrupt):
            append_row(tmp_path, {"id": "a"}, {"x": np.ones(1)})
    assert read_rows(tmp_path) == [] and "x" in read_details(tmp_path, "a")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(SquamataError, match="another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_an_error_inside_the_lock_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError


def asked_for(name: str, **fields: Any) -> Planned:
    return Planned(name, f"m, r, o, {name}", "m", 0, [["r", "o"]], **fields)


def test_rows_of_other_studies_are_kept_but_not_shown(tmp_path: Path) -> None:
    with locked(tmp_path):
        for name in ("a", "b", "c"):
            append_row(tmp_path, {"id": name}, {})
        write_plan(tmp_path, {"name": "s"}, [asked_for("c"), asked_for("a"), asked_for("d", error="too short")])
    study, rows = read_study(tmp_path)
    assert study == {"name": "s"} and [row["id"] for row in rows] == ["c", "a"]
    assert [row.error for row in read_plan(tmp_path)[1]] == [None, None, "too short"]
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(SquamataError, match="not the file of a study"):
        read_study(tmp_path)


def test_a_study_file_that_says_ids_alone_is_still_read(tmp_path: Path) -> None:
    row = {"id": "a", "model": "m", "recipe": "r", "override": "o", "seed": 3}
    with locked(tmp_path):
        append_row(tmp_path, row, {})
    (tmp_path / "study.json").write_text(json.dumps({"study": {"name": "s"}, "rows": ["b", "a"]}))
    assert read_study(tmp_path) == ({"name": "s"}, [row])
    planned = read_plan(tmp_path)[1]
    assert planned[1] == Planned("a", "m, r, o, seed 3", "m", 3, (("r", "o"),))
    assert planned[0].name == "b" and planned[0].asked == ()


@pytest.mark.parametrize("compared", [True, False])
def test_losses_round_trip(compared: bool) -> None:
    kl = np.array([0.5, 0.25]) if compared else None
    sums = UnitSums("windows", np.array([3.0, 4.0]), np.array([6.0, 9.0]), kl, kl)
    packed = pack_sums(0, sums) | pack_sums(1, UnitSums("documents", np.ones(1), np.ones(1)))
    found = unpack_sums(packed, 0)
    assert found is not None and found.kind == "windows" and np.array_equal(found.nats, sums.nats)
    assert (found.kl is None) == (not compared)
    second = unpack_sums(packed, 1)
    assert second is not None and second.kind == "documents" and unpack_sums(packed, 2) is None


def test_parquet_holds_the_rows_flat(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": "a", "bytes": {"total": 5}, "ci": [1.0, 2.0]}, {"id": "b", "bytes": {"total": 7}, "extra": "x"}]
    assert write_parquet(tmp_path, rows)
    found = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert found[0]["bytes.total"] == 5 and json.loads(found[0]["ci"]) == [1.0, 2.0] and found[0]["extra"] is None
    assert not write_parquet(tmp_path, [])
