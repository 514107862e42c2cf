"""``squamata inspect``: what is quantized where, in which format, with which scale; how two checkpoints differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squamata.cli.output import (
    JsonFile,
    check_files,
    check_json,
    counted,
    layer_ranges,
    note,
    progress,
    say,
    size,
    table,
    write_json,
)
from squamata.errors import SquamataError

if TYPE_CHECKING:
    from squamata.evaluate.inspection import SiteDifference, SiteRow
    from squamata.models.lm import LanguageModel

SHOWN = 40  # rows of a comparison that a person gets to see
NOISE = 1e-3  # scales that are closer than this come from sums in another order


def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder, hub name, or 'bundled'.")],
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Compare with this checkpoint, largest difference first.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="This layer only, one row a site.")] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure on this text what fraction of the values is clipped.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of the text, the first so many.")] = 8192,
    json_file: JsonFile = None,
) -> None:
    """Show format, scales and bytes of every site and tensor (layers together unless --layer is given)."""
    check_json(json_file)
    check_files(text)
    from squamata import pipeline
    from squamata.evaluate.inspection import clipped_fractions, differences, site_rows

    model = pipeline.load(checkpoint)
    if layer is not None and not 0 <= layer < model.config.n_layers:
        raise SquamataError(f"{checkpoint} has layers 0 to {model.config.n_layers - 1}, not {layer}")
    found = _header(checkpoint, model)
    clipped = None
    if text is not None:
        with progress("counting clipped values") as advance:
            clipped = clipped_fractions(model, text, max_tokens, advance)
    rows = [row for row in site_rows(model, clipped) if layer is None or row.layer == layer]
    found["sites"] = [asdict(row) for row in rows]
    if against is None:
        _show_rows(rows, together=layer is None, clipped=clipped is not None)
    else:
        changed = differences(model, pipeline.load(against))
        changed = [row for row in changed if layer is None or row.site.startswith(f"layers.{layer}.")]
        found |= {"against": against, "differences": [asdict(row) for row in changed]}
        _show_differences(changed, len(rows), checkpoint, against)
    write_json(json_file, found)


def _header(name: str, model: LanguageModel) -> dict[str, Any]:
    """Print and return where the checkpoint comes from."""
    from squamata.evaluate.size import bytes_by_part

    config, provenance = model.config, model.checkpoint.provenance
    sizes = bytes_by_part(model)
    say(
        f": {config.architecture}, {counted(config.n_layers, 'layer')}, d_model {config.d_model}, "
        f"vocabulary {config.vocab_size}, recipe {model.checkpoint.recipe.name}",
        title=name,
    )
    if provenance:
        drawn = _calibrated(provenance)
        version = provenance.get("squamata_version")
        say(drawn + (f"; written by squamata {version}" if version else "; read as it is"))
    named = ", ".join(f"{part} {size(sizes[part])}" for part in ("embedding", "layers", "sites", "total"))
    head = size(sizes["head"]) if sizes["head"] else "tied to the embedding"
    say(f"{named}, head {head}; cache of a sequence {size(sizes['cache'])}\n")
    return {
        "checkpoint": name,
        "architecture": config.architecture,
        "layers": config.n_layers,
        "recipe": model.checkpoint.recipe.to_mapping(),
        "provenance": provenance,
        "bytes": sizes,
    }


def _calibrated(provenance: Mapping[str, Any]) -> str:
    """What the checkpoint remembers of where its numbers come from; whoever wrote it may have left anything out."""
    calibration = provenance.get("calibration")
    if isinstance(calibration, dict) and {"samples", "tokens", "sha256"} <= calibration.keys():
        text = f"a text with sha256 {str(calibration['sha256'])[:12]}..., seed {provenance.get('seed')}"
        return f"calibrated on {calibration['samples']} samples, {calibration['tokens']} tokens of {text}"
    if "converted_from" in provenance:
        return f"converted from {provenance['converted_from']}"
    return "no calibration"


def _show_rows(rows: Sequence[SiteRow], together: bool, clipped: bool) -> None:
    """One line a site; layers that represent it alike share a line if ``together``."""
    groups: dict[tuple[str | int | None, ...], list[SiteRow]] = {}
    for row in rows:
        name = row.site.split(".", 2)[2] if row.layer is not None else row.site
        key = (name, row.kind, row.format, row.granularity, row.strategy, None if together else row.layer)
        groups.setdefault(key, []).append(row)
    for title, kinds in (("activations and states", ("activation", "state")), ("tensors", ("weight", "parameter"))):
        members = [group for group in groups.values() if group[0].kind in kinds]
        columns = [
            "<site",
            "<layers",
            "<format",
            "<scale from",
            "smallest\nscale",
            "\nmedian",
            "largest\nscale",
            "bytes",
        ]
        columns += ["clipped" if not together else "clipped\nat most"] if clipped and kinds[0] == "activation" else []
        table(title, columns, [_line(group)[: len(columns)] for group in members])
    if together:
        note("scales of these layers together; one layer with --layer N, every site with --json FILE")


def _line(members: Sequence[SiteRow]) -> list[str]:
    """One site, of one layer or of several that represent it alike."""
    first = members[0]
    shares = [row.clipped for row in members if row.clipped is not None]
    return [
        first.site if first.layer is None else first.site.split(".", 2)[2],
        layer_ranges([row.layer for row in members if row.layer is not None]),
        first.format if first.granularity is None else f"{first.format} per {first.granularity}",
        first.strategy or "",
        *_scales(members),
        _bytes(members),
        f"{max(shares):.1e}" if shares else "",
    ]


def _bytes(members: Sequence[SiteRow]) -> str:
    total = sum(row.bytes for row in members)
    return size(total) if total else ""


def _scales(members: Sequence[SiteRow]) -> list[str]:
    """The smallest scale of all members, the median of their medians, and the largest."""
    lows, middles, highs = (
        [value for row in members if (value := getattr(row, f"scale_{part}")) is not None]
        for part in ("min", "median", "max")
    )
    if not middles:
        return ["", "", ""]
    return [f"{number:.3g}" for number in (min(lows), statistics.median(middles), max(highs))]


def _show_differences(changed: Sequence[SiteDifference], sites: int, first: str, second: str) -> None:
    """Scales are medians; the ratio is that of the two scales that are farthest apart."""
    shown = [row for row in changed if not _is_noise(row)]
    table(
        f"{second} beside {first}: {len(changed)} of {counted(sites, 'site')} differ",
        ("<site", "<format", "scale", "other\nscale", "other /\nscale", "values\ndiffer"),
        [
            (
                row.site,
                row.first if row.first == row.second else f"{row.first} -> {row.second}",
                *map(_number, (row.first_scale, row.second_scale, row.scale_ratio, row.relative_difference)),
            )
            for row in shown[:SHOWN]
        ],
    )
    if hidden := len(changed) - len(shown):
        note(f"{counted(hidden, 'site')} not shown: their scales differ by less than {100 * NOISE:g} %")
    if len(shown) > SHOWN:
        note(f"{len(shown) - SHOWN} more: --layer N, or all with --json FILE")


def _is_noise(row: SiteDifference) -> bool:
    near = row.scale_ratio is not None and abs(row.scale_ratio - 1) < NOISE
    return near and row.first == row.second and not row.relative_difference


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
