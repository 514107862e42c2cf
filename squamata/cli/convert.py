"""``squamata convert``: a model of another layout -> a checkpoint of ours with the same numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from squamata.cli.output import JsonFile, check_json, progress, size, table, write_json


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder or hub name: Megatron's, Quamba's, or any that can be loaded."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the checkpoint to.")],
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Bring a model of another layout into ours: a float model stays float, a Quamba checkpoint quantized."""
    check_json(json_file)
    from squamata.conversion import convert as converted

    with progress("converting, layer by layer") as advance:
        result = converted(source, out, force, progress=advance)
    rows = (
        ("layout", f"{result.layout}, {result.architecture}"),
        ("recipe", result.recipe),
        ("tensors", size(result.bytes)),
        ("tokenizer", result.tokenizer),
        ("took", f"{result.seconds:.1f} s, {size(result.peak_rss_bytes)} of memory at its peak"),
    )
    table(f"{source} -> {out}", ("<", "<"), rows)
    write_json(json_file, asdict(result))
