"""``squamata quantize``: a float model and a recipe -> a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from squamata.cli.output import Device, JsonFile, check_files, check_json, note, progress, size, table, write_json


def quantize(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, hub name, or 'bundled'.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name ('squamata recipes list') or YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the checkpoint to.")],
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text, .txt or .jsonl; 'bundled' models have one of their own."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Documents drawn from it; the recipe says how many.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each; the recipe says how many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    embedding: Annotated[str | None, typer.Option(help="float, int8 or int4, instead of what the recipe says.")] = None,
    head: Annotated[str | None, typer.Option(help="float, int8 or int4, instead of what the recipe says.")] = None,
    device: Annotated[Device, typer.Option(help="Where it is computed.")] = Device.cpu,
    json_file: JsonFile = None,
) -> None:
    """Quantize a model by a recipe and save it."""
    check_json(json_file)
    check_files(calibration)
    from squamata import pipeline

    with _telling_what_is_kept(out), progress("quantizing, layer by layer") as advance:
        text = calibration_of(source, calibration)
        result = pipeline.quantize(
            source, recipe, out, text, samples, length, seed, force, resume, advance,
            embedding, head, device.value,
        )  # fmt: skip
    tokens = result.calibration.get("tokens")
    rows = (
        ("recipe", f"{result.recipe} on {result.architecture}"),
        ("float", size(result.bytes_float)),
        ("quantized", f"{size(result.bytes_quantized)}, {result.bytes_quantized / result.bytes_float:.3f} of float"),
        ("calibration", f"{tokens} tokens of {result.calibration['samples']} samples" if tokens else "none needed"),
        ("took", f"{result.seconds:.1f} s, {size(result.peak_rss_bytes)} of memory at its peak"),
    )
    table(f"{source} -> {out}", ("<", "<"), rows)
    write_json(json_file, asdict(result))


@contextmanager
def _telling_what_is_kept(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from squamata.save.write import can_be_resumed

        if can_be_resumed(out.absolute()):
            note("finished layers are kept: the same command with --resume goes on")
        raise


def calibration_of(source: str, given: Path | None) -> Path | None:
    """The calibration text: the one given, or the one that comes with the bundled model."""
    from squamata.load.hub import bundled, resolve

    if given is None and source == "bundled" and resolve(source) == bundled():
        return bundled() / "calibration.jsonl"
    return given
