"""``squamata sensitivity``: which sites and layers suffer, and how to spend a budget of bytes on them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from squamata.cli.evaluate import EvaluationMode
from squamata.cli.output import (
    Device,
    JsonFile,
    check_files,
    check_json,
    interval,
    layer_ranges,
    note,
    progress,
    say,
    size,
    table,
    write_json,
)
from squamata.cli.study import verbs
from squamata.errors import SquamataError
from squamata.text import check_writable, write_whole

if TYPE_CHECKING:
    from squamata.models.config import ModelConfig
    from squamata.report.forms import Forms
    from squamata.report.mixed import Mixer, Price, Search
    from squamata.report.sensitivity import Judge, Sensitivity
    from squamata.spec.recipe import Recipe

SHOWN = 40  # rows that a person gets to see


class Unit(StrEnum):
    """What is quantized at a time."""

    site = "site"
    layer = "layer"
    cell = "cell"


@dataclass(frozen=True)
class Budget:
    """What mixed precision may cost and is made of; no budget if no number is given. ``chip``: of ``ms``."""

    bytes: int | None
    bits: float | None
    ms: float | None
    mj: float | None
    chip: str
    upgrade: str
    judge: Path | None
    save: Path | None

    @property
    def numbers(self) -> list[float]:
        return [number for number in (self.bytes, self.bits, self.ms, self.mj) if number is not None]

    @property
    def given(self) -> bool:
        return bool(self.numbers)


def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Float model: folder, hub name, or 'bundled'.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to judge on, .txt or .jsonl.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Its formats are tried.")] = "quamba-w8a8",
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="For static scales.")] = None,
    per: Annotated[
        Unit, typer.Option(help="A site of all layers, a layer, or a site of a layer (cell) at a time.")
    ] = Unit.site,
    max_tokens: Annotated[int | None, typer.Option(help="Judge on the first so many tokens only.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    mode: Annotated[EvaluationMode, typer.Option(help="One pass, or token by token.")] = EvaluationMode.parallel,
    samples: Annotated[int | None, typer.Option(help="Calibration documents; the recipe says how many.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each; the recipe says how many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration draw and the search.")] = 0,
    device: Annotated[Device, typer.Option(help="cpu: the integer kernels; cuda: simulated.")] = Device.cpu,
    budget_bytes: Annotated[int | None, typer.Option(help="Mix two recipes: stored bytes of the model.")] = None,
    budget_bits: Annotated[float | None, typer.Option(help="The same, in stored bits a parameter.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="Or: DRAM time of a token on --chip, its least TPOT.")] = None,
    budget_mj: Annotated[float | None, typer.Option(help="Or: energy of a token on a 7 nm chip.")] = None,
    chip: Annotated[str, typer.Option(metavar="NAME|FILE", help="Device of --budget-ms, as in hardware.")] = "h200",
    upgrade: Annotated[str, typer.Option(help="The recipe of the better form.")] = "float",
    judge: Annotated[Path | None, typer.Option(metavar="FILE", help="Compare mixtures on this text.")] = None,
    save_recipe: Annotated[Path | None, typer.Option(metavar="YAML", help="Write the best mixture here.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="HTML", help="Write the pictures here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Quantize one site or layer at a time and rank them; with a budget, choose which to leave in a better form."""
    check_json(json_file)
    check_files(text, calibration, judge)
    budget = Budget(budget_bytes, budget_bits, budget_ms, budget_mj, chip, upgrade, judge, save_recipe)
    if len(budget.numbers) > 1:
        raise SquamataError("two budgets: give one of --budget-bytes, --budget-bits, --budget-ms and --budget-mj")
    for name, given in (("--save-recipe", save_recipe), ("--judge", judge)):
        if given is not None and not budget.given:
            raise SquamataError(f"{name} needs a budget: add --budget-bits, --budget-bytes, --budget-ms or --budget-mj")
    check_writable(save_recipe, "--save-recipe")
    from squamata.report.forms import CalibrationChoice
    from squamata.report.page import check_out, write_page
    from squamata.report.sensitivity import Judge, as_data, measure_sensitivity
    from squamata.run.device import check_device

    check_out(out)
    check_device(device.value)
    price = _price(budget)
    drawn = CalibrationChoice(calibration, samples, length, seed, device.value)
    with progress("calibrating and quantizing") as advance:
        advance(0, 1)
        forms = _forms(model, recipe, budget, drawn)
    mixer = _mixer(forms, per, budget, price)
    judging = Judge.of(model, text, verbs(), window, max_tokens, mode.value, device.value)
    with progress(f"one {per.value} at a time") as advance:
        measured = measure_sensitivity(forms, "low", per.value, judging, advance)
    _show(model, recipe, measured)
    found: dict[str, Any] = as_data(measured, Path(model).name, recipe)
    write_json(json_file, found)  # whatever becomes of the search
    if mixer is not None:
        found["search"] = _search(mixer, measured, judging, budget, seed)
        write_json(json_file, found)
    if out is not None:
        write_page(out, f"Sensitivity of {Path(model).name}", {}, [], [found])


def _forms(model: str, recipe: str, budget: Budget, drawn: Any) -> Forms:
    from squamata.report.forms import Forms
    from squamata.spec.recipe import Recipe

    recipes = {"low": Recipe.read(recipe)}
    if not recipes["low"].rules:
        raise SquamataError(f"recipe {recipe} quantizes nothing: choose another with --recipe")
    if budget.given and (better := Recipe.read(budget.upgrade)).rules:
        recipes["high"] = better
    return Forms(model, recipes, drawn, verbs())


def _show(model: str, recipe: str, measured: Sensitivity) -> None:
    rows = [
        (
            row.unit,
            row.sites,
            f"{row.kl:z.6f}",
            interval(row.kl_ci, 6),
            f"{row.perplexity:.3f}",
            f"{100 * row.top1_agreement:.2f}",
            row.verdict,
            size(row.bytes_saved) if row.bytes_saved > 0 else "",
        )
        for row in measured.rows[:SHOWN]
    ]
    columns = ("<quantized alone", "sites", "KL", "95 %", "perplexity", "top-1, %", "<perplexity", "saves")
    where = f"{measured.tokens} tokens, {measured.mode}, float perplexity {measured.float_perplexity:.3f}"
    table(f"{model} by {recipe}: one {measured.per} at a time\n{where}", columns, rows)
    alone = sum(row.kl for row in measured.rows)
    say(
        f"everything together: KL {measured.together_kl:.6f} ({interval(measured.together_kl_ci, 6)}), perplexity "
        f"{measured.together_perplexity:.3f}; the sum of the parts is {alone:.6f}"
    )
    if len(measured.rows) > SHOWN:
        note(f"{len(measured.rows) - SHOWN} more: all with --json FILE")
    if measured.mode == "parallel" and any(row.unit.endswith("mixer.state") for row in measured.rows):
        note("the state is rounded at every token only when decoding: judge it with --mode recurrent")


def _mixer(forms: Forms, per: Unit, budget: Budget, price: Price | None) -> Mixer | None:
    """What the budget is spent on, None without one; a budget that nothing fits is refused before anything runs."""
    if not budget.given:
        return None
    from squamata.report.mixed import Mixer, check_budget

    mixer = Mixer(forms, "low", "high" if forms.has("high") else "float", per.value, price)
    check_budget(mixer, _limit(mixer, budget))
    return mixer


def _price(budget: Budget) -> Price | None:
    """What the chip model says of a mixture, if the budget is of that."""
    from squamata.hardware import estimate
    from squamata.hardware.technology import Device
    from squamata.report.mixed import Price

    if budget.mj is not None:
        return Price("mJ a token", lambda config, recipe: estimate(config, recipe).energy_per_token_nj / 1e6)
    if budget.ms is None:
        return None
    device = Device.read(budget.chip)

    def dram_ms(config: ModelConfig, recipe: Recipe) -> float:
        return estimate(config, recipe, devices=(device,)).roofline[device.name].memory_ms

    return Price(f"ms a token on {device.name}", dram_ms)


def _limit(mixer: Mixer, budget: Budget) -> float:
    """The budget in the mixer's unit."""
    if budget.bits is not None:
        return int(budget.bits * mixer.forms.parameters / 8)
    return budget.numbers[0]


def _search(mixer: Mixer, measured: Sensitivity, judging: Judge, budget: Budget, seed: int) -> dict[str, Any]:
    from squamata.report.mixed import SearchPlan, as_data, search_mixture

    final = judging if budget.judge is None else judging.on(budget.judge)
    plan = SearchPlan(_limit(mixer, budget), judging, final, seed)
    with progress("searching mixtures") as advance:
        found = search_mixture(mixer, measured, plan, advance)
    _show_search(found, budget, len(mixer.units))
    if budget.judge is None:
        note("chosen and compared on the same text, which flatters both searches: give another with --judge FILE")
    if budget.save is not None:
        _save(mixer, found, budget.save)
    return as_data(found)


def _show_search(found: Search, budget: Budget, units: int) -> None:
    stored = found.unit == "bytes"
    rows = [
        (
            mixture.name,
            size(mixture.bytes),
            f"{mixture.bits_per_parameter:.3f}",
            *([] if stored else [f"{mixture.price:.4g}"]),
            f"{len(mixture.upgraded)} of {units}",
            mixture.evaluations or "",
            f"{mixture.kl:z.6f}",
            interval(mixture.kl_ci, 6),
            f"{mixture.perplexity:.3f}",
            interval(mixture.perplexity_ci, 3),
        )
        for mixture in found.mixtures
    ]
    paid = [] if stored else [found.unit.partition(" on ")[0]]
    columns = ("<", "bytes", "bits", *paid, "upgraded", "runs", "KL", "95 %", "perplexity", "95 %")
    limit = size(int(found.budget)) if stored else f"{found.budget:g} {found.unit}"
    table(f"upgraded to {budget.upgrade} within {limit}", columns, rows)
    upgraded = found.mixture(found.best).upgraded
    if upgraded and all(unit.startswith("layers.") and unit.count(".") == 1 for unit in upgraded):
        upgraded = [f"layers {layer_ranges([int(unit.split('.')[1]) for unit in upgraded])}"]
    what = ", ".join(upgraded) or "which upgrades nothing"
    say(f"KL of evolution beside greedy: {found.verdict}; lower KL: {found.best}, {what}")


def _save(mixer: Mixer, found: Search, path: Path) -> None:
    recipe = mixer.recipe(frozenset(found.mixture(found.best).upgraded), path.stem)
    write_whole(path, yaml.safe_dump(recipe.to_mapping(), sort_keys=False, width=120))
    note(f"recipe: {path}; next: squamata quantize ... --recipe {path}")
