"""``squamata report``: the folder of a study -> one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squamata.cli.output import check_files, note, say, size
from squamata.errors import SquamataError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'squamata study run' wrote; or JSON files.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="HTML", help="The page.")] = Path("report.html"),
) -> None:
    """Make one HTML page of a study: tables, Pareto fronts, heat maps, distributions. It opens without a network.

    JSON files of 'squamata sensitivity' and 'squamata outliers' in DIR are shown with it.
    """
    check_files(folder)
    from squamata.report.page import check_out, read_others, write_page
    from squamata.report.rows import read_study

    check_out(out)
    study, rows = read_study(folder)
    others = read_others(folder)
    if not rows and not others:
        raise SquamataError(f"{folder}: holds no rows of a study and no JSON of sensitivity or outliers; run one first")
    write_page(out, study.get("name", folder.name), study, rows, others, folder)
    say(f"{out}: {size(out.stat().st_size)}, {len(rows)} rows" + (f", {len(others)} further files" if others else ""))
    note("open it in a browser; it loads nothing from elsewhere")
