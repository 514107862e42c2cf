"""``squamata report``: the folder of a study -> one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squamata.cli.output import JsonFile, check_folders, check_json, counted, note, say, size, write_json
from squamata.errors import SquamataError

SHOWN = ("id", "model", "recipe", "override", "seed", "perplexity", "kl", "top1_agreement", "bits_per_byte", "bytes")


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'squamata study run' wrote; or JSON files.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="HTML", help="The page.")] = Path("report.html"),
    json_file: JsonFile = None,
) -> None:
    """Make one HTML page of a study: tables, Pareto fronts, heat maps, distributions. It opens without a network.

    JSON files of 'squamata sensitivity' and 'squamata outliers' in DIR are shown with it.
    """
    check_json(json_file)
    check_folders(folder)
    from squamata.report.compare import verdicts
    from squamata.report.page import check_out, read_others, write_page
    from squamata.report.rows import read_study

    check_out(out)
    study, rows = read_study(folder)
    others = read_others(folder)
    if not rows and not others:
        raise SquamataError(f"{folder}: holds no rows of a study and no JSON of sensitivity or outliers; run one first")
    write_page(out, study.get("name", folder.name), study, rows, others, folder)
    say(
        f"{out}: {size(out.stat().st_size)}, {counted(len(rows), 'row')}"
        + (f", {counted(len(others), 'further file')}" if others else "")
    )
    found = verdicts(folder, study, rows)
    told = [{name: row[name] for name in SHOWN} | {"verdict": found[row["id"]].words} for row in rows]
    write_json(json_file, {"page": out, "bytes": out.stat().st_size, "rows": told})
    note("open it in a browser; it loads nothing from elsewhere")
