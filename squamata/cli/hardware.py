"""``squamata hardware``: what a recipe costs on a chip, from a technology file and the model's shape alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squamata.cli.output import JsonFile, check_json, size, table, write_json

if TYPE_CHECKING:
    from squamata.hardware import Assumed, Device, Estimate
    from squamata.hardware.roofline import Roof
    from squamata.models.config import ModelConfig


def hardware(
    shape: Annotated[str, typer.Option(metavar="NAME|MODEL", help="mamba-130m ... mamba2-8b, or a model.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe, or a YAML file.")],
    technology: Annotated[str, typer.Option(help="Constants of the chip: a name, or a YAML file.")] = "7nm",
    against: Annotated[str | None, typer.Option(metavar="RECIPE", help="Another recipe, beside it.")] = None,
    ssd_groups: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Count scales and convolution as the published 7 nm estimate did, with so many SSD groups (it took "
            "8); what the model really has is shown beside it.",
        ),
    ] = None,
    head_groups: Annotated[int | None, typer.Option(min=1, help="Of ragged scales, a SSD group.")] = None,
    channel_groups: Annotated[int | None, typer.Option(min=1, help="Of ragged scales, a head group.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that share one reading of the weights.")] = 1,
    device: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", help="For the roofline; all that come along.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """SRAM for scales, energy and latency of finding one, DRAM traffic, energy a token, and the floor of TPOT."""
    check_json(json_file)
    from squamata.hardware import Device, Technology, working_group
    from squamata.hardware.technology import names

    config = _config(shape)
    ask = _Question(
        config,
        Technology.read(technology),
        (head_groups, channel_groups),
        batch,
        [Device.read(name) for name in device or names("devices")],
    )
    true = ask.about(recipe)
    columns = {recipe: true}
    content: dict[str, Any] = asdict(true)
    if ssd_groups is not None:
        assumed = working_group(config, ssd_groups)
        first = ask.about(recipe, assumed)
        columns = {f"{recipe},\n{ssd_groups} SSD groups assumed": first, f"{recipe},\nas it is": true}
        content = asdict(first) | {"assumed": asdict(assumed), "true": asdict(true)}
    if against is not None:
        columns[against] = ask.about(against)
        content["against"] = asdict(columns[against])
    _show(f"{shape}, {ask.technology.name}: {ask.technology.description}", columns)
    write_json(json_file, {"shape": shape} | content)


@dataclass(frozen=True)
class _Question:
    """Everything but the recipe."""

    config: ModelConfig
    technology: Any
    groups: tuple[int | None, int | None]
    batch: int
    devices: list[Device]

    def about(self, recipe: str, assumed: Assumed | None = None) -> Estimate:
        from squamata.hardware import estimate

        return estimate(self.config, recipe, self.technology, assumed, self.groups, self.batch, self.devices)


def _config(name: str) -> ModelConfig:
    """Of a published shape, or of a model where there is one."""
    from squamata.models.config import SHAPES, shape

    if name in SHAPES or not (Path(name).exists() or "/" in name or name == "bundled"):
        return shape(name)
    from squamata.cli.recipes import model_config

    config: ModelConfig = model_config(name)
    return config


def _show(title: str, columns: dict[str, Estimate]) -> None:
    found = list(columns.values())
    rows = [_row(*line) for line in zip(*map(_lines, found), strict=True)]
    table(title, ("<", *columns, "<"), rows)
    for one in {one.recipe: one for one in found}.values():
        table(
            f"decoding, {one.recipe}, batch {one.batch}",
            ("<device", "floor of TPOT, ms", "operations a byte", "ridge", "<bound by", "<"),
            [
                (device, f"{roof.floor_ms:.3g}", f"{roof.intensity:.3g}", f"{roof.ridge:.3g}", roof.bound, _fits(roof))
                for device, roof in one.roofline.items()
            ],
        )


def _fits(roof: Roof) -> str:
    return "" if roof.fits else "does not fit"


def _row(*cells: tuple[str, str, str]) -> list[str]:
    """One quantity of several estimates -> label, a number each, unit."""
    return [cells[0][0], *(cell[1] for cell in cells), cells[0][2]]


def _lines(one: Estimate) -> list[tuple[str, str, str]]:
    """Label, number, unit of everything that a person gets to see of an estimate."""
    latency, energy = one.lookup_latency_ns, one.energy_nj
    products = one.macs_per_token
    return [
        ("u, the SSM input", one.ssm_input, ""),
        ("groups where ragged", " x ".join(str(count) for count in one.groups.values()), "SSD x head x channel"),
        ("scales and ends of u, a layer", f"{one.scale_bytes_per_layer:,.0f}", "B"),
        (f"  all {one.layers} layers", f"{one.scale_bytes / 1024:.4g}", "KB of 1024 B"),
        ("  share of the weights", f"{100 * one.scale_share_of_model:.2g}", "%"),
        ("  in SRAM", f"{one.sram_mm2:.3g}", "mm2"),
        ("  in SRAM for a parallel search", f"{one.sram_parallel_mm2:.3g}", "mm2"),
        ("  share of the accelerator", f"{100 * one.accelerator_share:.2g}", "%"),
        ("a lookup reads", str(one.lookup_bits), "bits"),
        ("  energy", f"{one.lookup_energy_nj:.3g}", "nJ"),
        ("  sequential / parallel / table", " / ".join(f"{value:.3g}" for value in latency.values()), "ns"),
        ("  table", size(round(one.table_bytes)), "a layer"),
        ("lookups of a token, a layer", f"{one.lookups_per_layer:,}", ""),
        ("convolution of a token, a layer", f"{one.conv_energy_nj:.3g}", "nJ"),
        ("static scales of all sites", size(round(one.all_scale_bytes)), ""),
        ("  in SRAM", f"{one.all_scale_mm2:.3g}", "mm2"),
        ("weights in memory", size(round(one.model_bytes)), ""),
        ("DRAM traffic of a token", size(round(one.dram_bytes_per_token)), ""),
        ("  weights", size(round(one.traffic["weights"] / one.batch)), ""),
        ("  state, read and written", size(round(one.traffic["state"])), ""),
        ("  convolution's cache", size(round(one.traffic["conv"])), ""),
        ("activations, on the chip", size(round(one.traffic["activations"])), ""),
        ("int8 / float16 / float32 products", " / ".join(f"{n / 1e6:,.0f}" for n in products.values()), "million"),
        ("energy of a token", f"{one.energy_per_token_nj / 1e6:.4g}", "mJ"),
        ("  DRAM", f"{energy['dram'] / 1e6:.4g}", "mJ"),
        ("  products", f"{sum(energy[kind] for kind in products) / 1e6:.3g}", "mJ"),
        ("  activations in SRAM", f"{energy['sram'] / 1e6:.2g}", "mJ"),
        ("  lookups", f"{energy['lookup'] / 1e6:.2g}", "mJ"),
    ]
