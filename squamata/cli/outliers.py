"""``squamata outliers``: channels beyond six sigma, whether they stay, what zeroing them does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from squamata.cli.output import (
    JsonFile,
    check_files,
    check_json,
    counted,
    interval,
    layer_ranges,
    progress,
    say,
    table,
    write_json,
)
from squamata.cli.study import verbs

if TYPE_CHECKING:
    from squamata.report.outliers import OutlierRow, OutlierStudy


def outliers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Float model: folder, hub name, or 'bundled'.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to look at and to judge on, .txt or .jsonl.")],
    sites: Annotated[str, typer.Option(metavar="GLOB", help="Activations to look at, like *.mixer.x.")] = "*",
    sigmas: Annotated[float, typer.Option(min=0.0, help="Beyond so many standard deviations.")] = 6.0,
    max_tokens: Annotated[int | None, typer.Option(help="Of the text, the first so many.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens a window when judging.")] = 512,
    out: Annotated[Path | None, typer.Option(metavar="HTML", help="Write the pictures here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Find outlier channels, see whether they persist over layers and documents, and zero them (Mamba-PTQ)."""
    check_json(json_file)
    check_files(text)
    from squamata import pipeline
    from squamata.report.outliers import as_data, study_outliers
    from squamata.report.page import check_out, write_page
    from squamata.report.sensitivity import Judge

    check_out(out)
    loaded = pipeline.load(model, mode="float")
    judge = Judge.of(model, text, verbs(), window, max_tokens)
    with progress("zeroing outlier channels") as advance:
        found = study_outliers(loaded, judge, sites, sigmas, advance)
    _show(model, found)
    data = as_data(found, Path(model).name)
    write_json(json_file, data)
    if out is not None:
        write_page(out, f"Outlier channels of {Path(model).name}", {}, [], [data])


def _show(model: str, found: OutlierStudy) -> None:
    by_part: dict[str, list[OutlierRow]] = {}
    for row in found.rows:
        by_part.setdefault(row.part, []).append(row)
    table(
        f"{model}: channels whose peak is beyond {found.sigmas:g} sigma\n{counted(found.tokens, 'token')} of "
        f"{counted(found.documents, 'document')}",
        (
            "<site",
            "channels",
            "outliers",
            "share, %",
            "<in layers",
            "same in\nother layers, %",
            "same in\ndocuments, %",
        ),
        [_line(part, rows) for part, rows in by_part.items()],
    )
    if not found.zeroed:
        say("no site has such a channel")
        return
    table(
        f"set to zero (float: perplexity {found.float_perplexity:.3f}), and as many other channels drawn at random",
        ("<site", "channels", "perplexity", "95 %", "KL", "<perplexity", "random:\nperplexity", "KL"),
        [
            (
                row.part,
                row.channels,
                f"{row.perplexity:.3f}",
                interval(row.perplexity_ci, 3),
                f"{row.kl:.5f}",
                row.verdict,
                f"{row.random_perplexity:.3f}",
                f"{row.random_kl:.5f}",
            )
            for row in found.zeroed
        ],
    )


def _line(part: str, rows: list[OutlierRow]) -> tuple[object, ...]:
    count, channels = sum(len(row.outliers) for row in rows), sum(row.channels for row in rows)
    layers = layer_ranges([row.layer for row in rows if row.outliers and row.layer >= 0])
    return (
        part,
        channels,
        count,
        f"{100 * count / channels:.2f}",
        layers,
        _mean(rows, "layers"),
        _mean(rows, "documents"),
    )


def _mean(rows: list[OutlierRow], measure: str) -> str:
    """Mean over all outlier channels of the rows."""
    known = [(getattr(row, measure), len(row.outliers)) for row in rows if getattr(row, measure) is not None]
    return f"{100 * sum(share * count for share, count in known) / sum(n for _, n in known):.0f}" if known else ""
