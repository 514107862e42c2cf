"""``squamata quantize``: a float model and a recipe -> a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squamata.cli.output import (
    Device,
    JsonFile,
    check_files,
    check_json,
    counted,
    note,
    progress,
    size,
    table,
    write_json,
)
from squamata.errors import SquamataError

if TYPE_CHECKING:
    from squamata.pipeline import Quantization


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
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Go on where a killed run stopped, or throw its layers away."),
    ] = None,
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
        result = pipeline.quantize(
            source, recipe, out, calibration, samples, length, seed, force, resume, advance,
            embedding, head, device.value,
        )  # fmt: skip
    _show(f"{source} -> {out}", result)
    write_json(json_file, asdict(result))


def _show(title: str, result: Quantization) -> None:
    resumed = f"after {counted(result.parts_resumed, 'part')} that an interrupted run had finished"
    rows = (
        ("recipe", f"{result.recipe} on {result.architecture}"),
        ("float", size(result.bytes_float)),
        ("quantized", f"{size(result.bytes_quantized)}, {result.bytes_quantized / result.bytes_float:.3f} of float"),
        ("calibration", _drawn(result.calibration) if result.calibration else "none needed"),
        *((("resumed", resumed),) if result.parts_resumed else ()),
        ("took", f"{result.seconds:.1f} s, {size(result.peak_rss_bytes)} of memory at its peak"),
    )
    table(title, ("<", "<"), rows)


def _drawn(calibration: Mapping[str, Any]) -> str:
    """How much text was drawn, and that it is less than was asked for, if so."""
    samples, asked = calibration["samples"], calibration["settings"]["samples"]
    drawn = f"{counted(calibration['tokens'], 'token')} of {counted(samples, 'sample')}"
    return drawn if samples == asked else f"{drawn}; the text holds no more, {asked} were asked for"


@contextmanager
def _telling_what_is_kept(out: Path) -> Iterator[None]:
    try:
        yield
    except SquamataError:  # its line says it
        raise
    except BaseException:
        from squamata.save.write import parts_left

        if parts_left(out):
            note("finished layers are kept: the same command with --resume goes on")
        raise
