"""What every verb shares: tables on stdout, progress and notes on stderr, and the same numbers as a JSON file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
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


def stdout() -> Console:
    """Where results go."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)


def stderr() -> Console:
    """Where progress, notes and errors go."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line of results; ``text`` may hold rich markup."""
    stdout().print(text, soft_wrap=True)


def note(text: str) -> None:
    """Print one dim line that is no result."""
    stderr().print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a title and a table. A column whose name starts with ``<`` is text, others are numbers, aligned right.

    Without column names there is no head. Long cells are wrapped; where that is not enough for a narrow terminal the
    lines are longer than it, because half a number is worse.
    """
    if title:
        stdout().print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    named = any(column.strip("<") for column in columns)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, show_header=named)
    for place, column in enumerate(columns):
        name = column.removeprefix("<")
        words = [*name.split("\n"), *(str(row[place]) for row in rows if row[place] is not None)]
        longest = max(map(len, words))
        justify: JustifyMethod = "left" if column.startswith("<") else "right"
        whole = longest <= LONGEST_UNBROKEN
        shown.add_column(name, justify=justify, no_wrap=whole, min_width=longest if whole else LONGEST_UNBROKEN)
    for row in rows:
        shown.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    console = stdout()
    least = Measurement.get(console, console.options.update(max_width=1000), shown).minimum
    console.width = max(console.width, least)
    console.print(shown)
    console.print()


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
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_files(*paths: Path | None) -> None:
    """Refuse, before any work is done, a file to read that is not there."""
    for path in paths:
        if path is not None and not path.exists():
            raise SquamataError(f"no such file: {path}")


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
