"""What every verb shares: tables on stdout, progress and notes on stderr, and the same numbers as a JSON file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.filesize import decimal
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from squamata.errors import SquamataError
from squamata.text import check_writable, write_whole

WIDTH_OF_A_FILE = 140  # columns of tables that go into a pipe or file
LONGEST_UNBROKEN = 32  # characters of a cell; columns with longer ones are the first to be wrapped

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers to this file, as JSON.")
]


class Device(StrEnum):
    """Where models run."""

    cpu = "cpu"
    cuda = "cuda"


_unprinted: list[str] = []  # why results could not be printed


class _Results(Console):
    """Goes on when the reader of a pipe has seen enough, so that a verb still writes its JSON."""

    def on_broken_pipe(self) -> None:
        give_up_stdout()


def stdout() -> Console:
    """Where results go."""
    return _Results(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)


def give_up_stdout() -> None:
    """What is printed from now on goes nowhere, and neither does Python complain of it when it ends."""
    with suppress(OSError, ValueError):  # a stream without a file, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def why_unprinted() -> str | None:
    """Why some results were not printed, told once; None if all were."""
    reason = _unprinted[0] if _unprinted else None
    _unprinted.clear()
    return reason


def prepare_streams() -> None:
    """A stream that is closed swallows what is printed; a character that an encoding does not have becomes ``?``."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def emit(text: str, end: str = "\n") -> None:
    """Print plain text at once. BrokenPipeError if nobody reads it any more, SquamataError if it cannot be written."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        raise SquamataError(f"cannot write to standard output: {error.strerror}") from None


def _print(console: Console, shown: Any = "", soft_wrap: bool = False) -> None:
    """Print results; if that fails the verb goes on, and ``why_unprinted`` says it at the end."""
    try:
        console.print(shown, soft_wrap=soft_wrap)
    except OSError as error:
        give_up_stdout()
        _unprinted.append(str(error.strerror))


def stderr() -> Console:
    """Where progress, notes and errors go."""
    return Console(stderr=True, highlight=False)


def say(text: str, title: str = "") -> None:
    """Print one line of results, a title before it in bold."""
    _print(stdout(), (f"[bold]{escape(title)}[/bold]" if title else "") + escape(text), soft_wrap=True)


def note(text: str) -> None:
    """Print one dim line that is no result."""
    with suppress(OSError):  # a log on a full disk
        stderr().print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a title and a table. A column whose name starts with ``<`` is text, others are numbers, aligned right.

    Without column names there is no head. Long cells are wrapped; where that is not enough for a narrow terminal the
    lines are longer than it, because half a number is worse.
    """
    if title:
        say("", title)
    named = any(column.strip("<") for column in columns)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, show_header=named)
    for place, column in enumerate(columns):
        name = column.removeprefix("<")
        words = [*name.split("\n"), *(str(row[place]) for row in rows if row[place] is not None)]
        longest = max(map(len, words))
        justify: JustifyMethod = "left" if column.startswith("<") else "right"
        whole = longest <= LONGEST_UNBROKEN
        shown.add_column(escape(name), justify=justify, no_wrap=whole, min_width=longest if whole else LONGEST_UNBROKEN)
    for row in rows:
        shown.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    console = stdout()
    least = Measurement.get(console, console.options.update(max_width=1000), shown).minimum
    console.width = max(console.width, least)
    _print(console, shown)
    _print(console)


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with an ETA on stderr, if that is a terminal; gives the callback ``(done, total)``."""
    console = stderr()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(doing), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_files(*paths: Path | None) -> None:
    """Refuse, before any work is done, a file to read that is not there."""
    for path in paths:
        if path is not None and not path.exists():
            raise SquamataError(f"no such file: {path}")


def check_folders(*paths: Path | None) -> None:
    """Refuse, before any work is done, a folder to read that is not there."""
    for path in paths:
        if path is not None and not path.is_dir():
            raise SquamataError(f"{path}: is a file; give a folder" if path.exists() else f"no such folder: {path}")


def check_json(path: Path | None) -> None:
    """Refuse, before any work is done, a JSON file that could not be written after it."""
    check_writable(path, "--json")


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write the numbers of a verb, whole or not at all; NaN and infinity become null."""
    if path is not None:
        write_whole(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Plain JSON data: paths as text, tuples as lists, numbers that JSON cannot hold as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return str(value) if isinstance(value, Path) else value


def size(count: int) -> str:
    """Bytes for a person: ``11.7 MB``."""
    return decimal(count)


def counted(count: int, thing: str) -> str:
    """A number of things for a person: ``1 token``, ``2 tokens``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def interval(bounds: tuple[float, float] | None, digits: int) -> str:
    """A confidence interval for a person, or nothing."""
    return "" if bounds is None else f"{bounds[0]:z.{digits}f} .. {bounds[1]:z.{digits}f}"


def layer_ranges(layers: Sequence[int]) -> str:
    """Layer numbers for a person: ``0-3, 7``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
