"""Runs the command line in this process, as a user would see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from squamata.cli.main import main


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("evaluate", model, "--text", path)``: exit status, stdout, stderr."""

    def call(*arguments: object) -> Outcome:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def succeed(command: Command, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a command that must succeed, and gives what it wrote with ``--json``."""

    def call(*arguments: object) -> dict[str, Any]:
        path = tmp_path / "numbers.json"
        outcome = command(*arguments, "--json", path)
        assert outcome.status == 0, outcome.err
        found: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return found

    return call


@pytest.fixture
def refuse(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail with status 2 and one line, and leave every file as it was; gives the line."""

    def call(*arguments: object) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        outcome = command(*arguments)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert outcome.status == 2, outcome
        assert outcome.err.startswith("squamata: ") and outcome.err.count("\n") == 1, outcome.err
        assert "Traceback" not in outcome.err and outcome.out == ""
        assert after == before
        return outcome.err.removeprefix("squamata: ").rstrip("\n")

    return call
