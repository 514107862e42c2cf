"""A study gives the numbers of the verbs, goes on after a kill, and runs in processes and on a cluster alike."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import squamata
from squamata.errors import SquamataError
from squamata.evaluate.perplexity import difference_of_sums
from squamata.evaluate.size import bytes_by_part
from squamata.load.hub import bundled
from squamata.report.compare import verdicts
from squamata.report.plan import Places, Study
from squamata.report.rows import locked, read_details, read_plan, read_rows, unpack_sums
from squamata.report.study import SCRATCH, StudyRun, run_study
from squamata.report.verbs import Verbs
from squamata.report.workers import Workforce

Write = Callable[..., Path]
PACKAGE = Path(squamata.__file__).parents[1]


def run(path: Path, out: Path, verbs: Verbs, **options: Any) -> StudyRun:
    return run_study(Study.read(path), Places(path), out, verbs, **options)


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["id"], row["perplexity"], row["kl"], row["bytes"]) for row in rows]


def test_rows_hold_what_the_verbs_give(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    fields = {"modes": ["parallel", "recurrent"], "recipes": ["quamba-w8a8"], "distributions": ["layers.1.mixer.u"]}
    done = run(write_study(**fields, seeds=[5]), tmp_path / "out", verbs)
    (row,) = done.rows
    made = squamata.quantize(
        "bundled", "quamba-w8a8", tmp_path / "made", bundled() / "calibration.jsonl", 4, 48, seed=5
    )
    model = squamata.load(tmp_path / "made")
    excerpt = bundled() / "excerpt.jsonl"
    for entry, mode in zip(row["evaluations"], ("parallel", "recurrent"), strict=True):
        expected = squamata.evaluate(model, excerpt, squamata.load("bundled"), 32, 96, mode).to_dict()
        del expected["seconds"]
        for name, value in expected.items():
            assert entry[name] == json.loads(json.dumps(value)), name
    assert row["perplexity"] == row["evaluations"][0]["perplexity"] and row["architecture"] == "mamba2"
    drawn = row["provenance"]["calibration_drawn"]
    assert drawn == made.calibration and drawn["seed"] == 5 and row["seed"] == 5
    assert row["provenance"]["squamata_version"] == squamata.__version__
    assert row["resolved_recipe"]["calibration"] == {"samples": 4, "length": 48}
    assert row["measured_on"] == {"device": "cpu", "arithmetic": "integer"}
    assert row["simulation"]["largest_difference"] == 0 and 16 < row["simulation"]["tokens"] <= 128
    assert row["bytes"] == bytes_by_part(model) and row["quantize_seconds"] > 0 and row["peak_rss_bytes"] > 1e7
    assert str(tmp_path) not in json.dumps(row) and str(PACKAGE) not in json.dumps(row)
    sums = unpack_sums(read_details(tmp_path / "out", row["id"]))
    assert sums is not None and np.exp(sums.nats.sum() / sums.tokens.sum()) == pytest.approx(
        row["perplexity"], rel=1e-12
    )
    assert not (tmp_path / "out" / SCRATCH).exists()


def test_a_text_is_judged_in_the_modes_that_name_it(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The snake sheds its skin. " * 8)
    fields = {"recipes": ["float"], "text": {"bundled": "bundled", "other": str(other)}}
    modes = {"parallel": ["bundled", "other"], "recurrent": ["other"]}
    (row,) = run(write_study(**fields, modes=modes), tmp_path / "out", verbs).rows
    judged = [(entry["text"], entry["mode"]) for entry in row["evaluations"]]
    assert judged == [("bundled", "parallel"), ("other", "parallel"), ("other", "recurrent")]


def test_a_second_run_measures_nothing_and_a_larger_study_only_what_is_new(
    write_study: Write, verbs: Verbs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run(write_study(recipes=["float", "w4a16"]), out, verbs)
    written = (out / "rows.jsonl").read_bytes()
    again = run(write_study(recipes=["float", "w4a16"]), out, verbs)
    assert (first.measured, again.measured) == (2, 0) and (out / "rows.jsonl").read_bytes() == written
    larger = run(write_study(recipes=["w4a16", "quamba-w8a8", "float"]), out, verbs)
    assert larger.measured == 1 and (out / "rows.jsonl").read_bytes().startswith(written)
    assert [row["recipe"] for row in larger.rows] == ["w4a16", "quamba-w8a8", "float"]
    compared = verdicts(out, {"baseline": {"recipe": "float"}}, larger.rows)
    base, row = (next(some for some in larger.rows if some["recipe"] == name) for name in ("float", "w4a16"))
    assert compared[base["id"]].words == "baseline"
    losses = [unpack_sums(read_details(out, some["id"])) for some in (base, row)]
    assert losses[0] is not None and losses[1] is not None
    assert compared[row["id"]].difference == difference_of_sums(losses[0], losses[1])


def test_a_row_that_fails_leaves_the_others(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    """The text of the second row's calibration is too short: known only when it is drawn."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "."}\n')
    overrides = [{"name": "short", "calibration_text": str(short)}, {"name": "as it is"}]
    path = write_study(recipes=["quamba-w8a8"], overrides=overrides, calibration="bundled", length=2)
    short.write_text('{"text": " "}\n')
    done = run(path, tmp_path / "out", verbs)
    assert done.measured == 1 and [row["override"] for row in done.rows] == ["as it is"]
    assert len(done.failures) == 1 and done.failures[0].startswith("bundled, quamba-w8a8, short, seed 0: ")
    missing, there = read_plan(tmp_path / "out")[1]
    assert missing.error == done.failures[0] and there.error is None


def fails_at_times(model: Any, recipe: Any, out: Any, *drawn: Any, **options: Any) -> Any:
    if recipe.name == "w4a16":
        raise RuntimeError("not enough\nmemory")
    return squamata.quantize(model, recipe, out, *drawn, **options)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_nobody_foresaw_costs_its_own_row_only(
    write_study: Write, verbs: Verbs, tmp_path: Path, workers: int
) -> None:
    path, out = write_study(recipes=["w4a16", "float"]), tmp_path / "out"
    done = run(path, out, replace(verbs, quantize=fails_at_times), force=Workforce(workers))
    assert [row["recipe"] for row in done.rows] == ["float"] and done.measured == 1
    name = read_plan(out)[1][0].id
    told = (
        f"bundled, w4a16, as it is, seed 0: RuntimeError: not enough memory (traceback: details/{name}.traceback.txt)"
    )
    assert done.failures == [told]
    kept = out / "details" / f"{name}.traceback.txt"
    assert "in fails_at_times" in kept.read_text()
    again = run(path, out, verbs)
    assert (again.measured, again.failures) == (1, []) and not kept.exists()
    assert [row.error for row in read_plan(out)[1]] == [None, None]


def test_a_folder_of_the_users_is_left_alone(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    mine = tmp_path / "scratch" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run(write_study(recipes=["float"]), tmp_path, verbs)
    assert mine.read_text() == "mine"


def start(path: Path, out: Path, *options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "squamata", "study", "run", path, "--out", out, *options]
    return subprocess.Popen(
        [str(part) for part in command], cwd=PACKAGE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for_rows(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    path, deadline = out / "rows.jsonl", time.monotonic() + 120
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_loses_nothing_and_repeats_nothing(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    """Two workers, killed after the first of four rows: what was written stays, workers die too, the rest is done."""
    out, path = tmp_path / "out", write_study(recipes=["w4a16", "quamba-w8a8"], seeds=[0, 1])
    process = start(path, out, "--workers", 2)
    wait_for_rows(out, 1, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) >= 2 and not alive
    kept = (out / "rows.jsonl").read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    before = kept.count(b"\n")
    done = run(path, out, verbs)
    assert 1 <= before < 4 and done.measured == 4 - before
    assert (out / "rows.jsonl").read_bytes().startswith(kept)
    assert len({row["id"] for row in read_rows(out)}) == len(read_rows(out)) == len(done.rows) == 4
    assert not (out / SCRATCH).exists()
    alone = run(path, tmp_path / "alone", verbs)
    assert numbers(done.rows) == numbers(alone.rows)


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_completes_the_study(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the library 'ray' is not installed")
    from ray.cluster_utils import Cluster

    path, out = write_study(recipes=["quamba-w8a8", "w4a16"], seeds=[0, 1]), tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        seen: list[int] = []

        def progress(done: int, total: int) -> None:
            if not seen:
                cluster.remove_node(second, allow_graceful=False)
            seen.append(done)

        done = run(path, out, verbs, force=Workforce(ray=cluster.address), progress=progress)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert done.measured == 4 and not done.failures and seen == [1, 2, 3, 4]
    assert len(read_rows(out)) == 4
    here = run(write_study(seeds=[0], recipes=["quamba-w8a8"]), tmp_path / "here", verbs)
    assert numbers(here.rows)[0] in numbers(done.rows)


def test_a_folder_that_another_run_writes_to_is_refused(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(SquamataError, match="another run is writing"):
        run(write_study(recipes=["float"]), tmp_path / "out", verbs)
    assert read_rows(tmp_path / "out") == []
