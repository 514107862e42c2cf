"""``squamata recipes``: what recipes there are, what one says, and where it puts what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from squamata.cli.output import JsonFile, check_json, counted, emit, layer_ranges, say, table, write_json
from squamata.errors import SquamataError
from squamata.spec.recipe import Recipe, recipe_names
from squamata.spec.sites import all_sites

app = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="List, show or check recipes.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, or a YAML file.")]


@app.callback()
def recipes(context: typer.Context) -> None:
    """List, show or check recipes: quantization methods as YAML."""
    if context.invoked_subcommand is None:
        listing()


@app.command("list")
def listing(json_file: JsonFile = None) -> None:
    """The recipes that come with the package."""
    check_json(json_file)
    found = [Recipe.read(name) for name in recipe_names()]
    table(
        "",
        ("<recipe", "<for", "<what it does"),
        [(recipe.name, ", ".join(recipe.architectures), recipe.description) for recipe in found],
    )
    write_json(
        json_file,
        {
            "recipes": [
                {"name": recipe.name, "architectures": recipe.architectures, "description": recipe.description}
                for recipe in found
            ]
        },
    )


@app.command("show")
def show(
    name: Name,
    sites: Annotated[
        str | None,
        typer.Option(metavar="N_LAYERS|MODEL", help="Instead: what lands where, in so many layers or in this model."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """The resolved recipe as YAML, or with --sites what it does to every site."""
    check_json(json_file)
    recipe = Recipe.read(name)
    content: dict[str, Any] = {"recipe": recipe.to_mapping()}
    if sites is None:
        emit(yaml.safe_dump(recipe.to_mapping(), sort_keys=False, width=120, allow_unicode=True), end="")
    else:
        content["sites"] = {}
        for blocks in _block_lists(sites, recipe):
            landed = {site: spec.describe() for site, spec in recipe.resolve(blocks).items()}
            content["sites"]["/".join(sorted(set(blocks)))] = landed
            _show_sites(recipe, blocks, landed)
    write_json(json_file, content)


def _block_lists(sites: str, recipe: Recipe) -> list[tuple[str, ...]]:
    """The layers to show: of a model, or so many of each architecture that the recipe is for."""
    if not sites.isdecimal():
        return [model_config(sites).blocks]
    if not 1 <= int(sites) <= 1000:
        raise SquamataError(f"--sites {sites}: give 1 to 1000 layers, or a model")
    return [(kind,) * int(sites) for kind in recipe.architectures]


def model_config(name: str) -> Any:
    """Configuration of a checkpoint, float or quantized, without reading its weights."""
    from squamata.load.hub import resolve
    from squamata.load.source import is_squamata_checkpoint, open_source
    from squamata.save.read import parse, read_description

    folder = resolve(name)
    if is_squamata_checkpoint(folder):
        return parse(read_description(folder), folder)[0]
    return open_source(name).config


def _show_sites(recipe: Recipe, blocks: tuple[str, ...], landed: dict[str, str]) -> None:
    """One row for each site and representation, layers of the same kind together."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for site, info in all_sites(blocks).items():
        _, layer, rest = site.split(".", 2) if site.startswith("layers.") else ("", "", site)
        entry = layers.setdefault((rest, info.kind, landed.get(site, "float")), [])
        entry += [int(layer)] if layer else []
    table(
        f"{recipe.name} on {counted(len(blocks), 'layer')}, {'/'.join(sorted(set(blocks)))}",
        ("<site", "<kind", "<representation", "<layers"),
        [(*key, layer_ranges(numbers)) for key, numbers in layers.items()],
    )


@app.command("check")
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe's YAML file, or a name.")],
    json_file: JsonFile = None,
) -> None:
    """Refuse a recipe that could not be carried out: unknown keys, sites, strategies, and scales that cannot run."""
    check_json(json_file)
    from squamata import scales, transform
    from squamata.calibrate.correct import check_correction
    from squamata.calibrate.learn import check_tuner
    from squamata.quantize import check as check_weight_quantizer

    if Path(file).is_file() and Path(file).suffix not in (".yaml", ".yml"):
        raise SquamataError(f"{file}: a recipe file ends in .yaml")
    recipe = Recipe.read(file)
    transform.check(recipe)
    check_weight_quantizer(recipe)
    check_tuner(recipe)
    check_correction(recipe)
    deepest = max(
        (layer if layer >= 0 else -layer - 1 for rule in recipe.rules for layer in rule.layers or ()), default=0
    )
    found: dict[str, dict[str, int]] = {}
    for kind in recipe.architectures:
        specs = recipe.resolve((kind,) * (deepest + 1))
        for site, spec in specs.items():
            scales.check(spec, site)
        transform.check(recipe, specs.values())
        check_weight_quantizer(recipe, specs.values())
        found[kind] = dict(Counter(spec.form for spec in specs.values()))
        numbers = (
            ", ".join(f"{counted(count, 'site')} in {name}" for name, count in found[kind].items())
            or "everything in float"
        )
        say(f"{recipe.name}, {kind}, {counted(deepest + 1, 'layer')}: {numbers}")
    write_json(json_file, {"recipe": recipe.name, "layers": deepest + 1, "formats": found})
