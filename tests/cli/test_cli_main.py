"""The frame around the verbs: help, versions, wrong flags, interruption, JSON files, tables."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squamata import __version__, pipeline
from squamata.cli import output
from squamata.errors import SquamataError


def test_help_lists_every_verb_and_does_not_wait_for_torch() -> None:
    code = "import sys; from squamata.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("quantize", "evaluate", "generate", "chat", "inspect", "profile", "demo", "recipes"):
        assert f" {verb} " in done.stdout


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "squamata", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"squamata {__version__}\n")


def test_no_arguments_show_the_help(command: Callable[..., Any]) -> None:
    assert "Usage: squamata" in command().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quantize", "bundled", "--recipe", "w8a8", "--out", "x", "--forse"), "No such option: --forse"),
        (("quantize", "bundled", "--out", "x"), "Missing option '--recipe'"),
        (("evaluate",), "Missing argument 'MODEL'"),
        (("evalate", "bundled"), "'evaluate'"),
        (("evaluate", "bundled", "--mode", "serial"), "parallel"),
        (("generate", "bundled", "x", "--seed", "many"), "--seed"),
    ],
)
def test_wrong_usage_is_one_line(refuse: Callable[..., str], arguments: tuple[str, ...], said: str) -> None:
    line = refuse(*arguments)
    assert said in line and "--help" in line


def test_interruption_is_one_line(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load", interrupted)
    outcome = command("generate", "bundled", "The")
    assert (outcome.status, outcome.err) == (130, "squamata: interrupted\n")


@pytest.mark.parametrize(
    ("where", "said"), [("no/such/folder/x.json", "no folder"), (".", "is a folder")], ids=["missing", "folder"]
)
def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    monkeypatch.setattr(pipeline, "quantize", lambda *_, **__: pytest.fail("worked first"))
    arguments = ("quantize", "bundled", "--recipe", "w4a16", "--out", tmp_path / "out", "--json", tmp_path / where)
    assert said in refuse(*arguments)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "numbers.json"
    output.write_json(path, {"a": 1, "b": float("nan"), "c": (Path("x"), 2.5)})
    assert json.loads(path.read_text()) == {"a": 1, "b": None, "c": ["x", 2.5]}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SquamataError, match="No space left"):
        output.write_json(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == 1 and list(tmp_path.iterdir()) == [path]


def test_progress_says_nothing_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("working") as advance:
        advance(1, 2)
    assert capsys.readouterr() == ("", "")


def test_tables_hold_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    output.table("title", ("<name", "bytes"), [("[brackets]", 12), ("plain", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title" and lines[1].split() == ["name", "bytes"]
    assert lines[3].split() == ["[brackets]", "12"] and lines[4].split() == ["plain"]


def test_names_are_never_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    output.table("[/a] title", ("<", "recipe\n[/b]"), [("[/c]", 1)])
    output.say("[/d] said", title="[/e]")
    output.note("[/f]")
    with output.progress("[/g]") as advance:
        advance(1, 2)
    captured = capsys.readouterr()
    assert all(f"[/{letter}]" in captured.out for letter in "abcde") and "[/f]" in captured.err


@pytest.mark.parametrize(("count", "said"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens")])
def test_one_thing_is_not_said_to_be_several(count: int, said: str) -> None:
    assert output.counted(count, "token") == said


def in_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    """Runs a line in which ``$SQUAMATA`` is the command line, as a user's shell would."""
    line = line.replace("$SQUAMATA", f"{shlex.quote(sys.executable)} -m squamata")
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=120)


def test_a_reader_that_has_seen_enough_costs_neither_the_status_nor_the_json(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    done = in_a_shell(f"$SQUAMATA recipes list --json {path} | head -c 1")
    assert (done.returncode, done.stderr) == (0, "") and len(json.loads(path.read_text())["recipes"]) > 20
    for verb in ("--help", "recipes show w8a8", "generate bundled x --max-new-tokens 2"):
        done = in_a_shell(f"$SQUAMATA {verb} | true")
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_printed_are_said_to_be_lost_and_the_json_is_written(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    for verb in (f"recipes list --json {path}", "recipes show w8a8"):
        done = in_a_shell(f"$SQUAMATA {verb} > /dev/full")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "cannot write to standard output: No space left on device" in done.stderr
    assert path.is_file()
    assert in_a_shell("$SQUAMATA recipes show nosuch 2> /dev/full").returncode == 2


def test_streams_that_are_closed_or_speak_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    assert in_a_shell(f"$SQUAMATA recipes list --json {path} >&- 2>&-").returncode == 0 and path.is_file()
    done = in_a_shell("PYTHONIOENCODING=ascii $SQUAMATA hardware --shape mamba-130m --recipe w8a8")
    assert done.returncode == 0 and "roofline" not in done.stderr, done.stderr
    done = in_a_shell("printf 'caf\\xe9\\n' | PYTHONIOENCODING=ascii $SQUAMATA chat bundled --max-new-tokens 1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("layers", "said"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([7, 0, 1, 4, 5], "0-1, 4-5, 7")]
)
def test_layer_ranges(layers: list[int], said: str) -> None:
    assert output.layer_ranges(layers) == said
