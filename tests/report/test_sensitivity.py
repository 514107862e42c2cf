"""Toggling sites gives what quantizing them gives; searches spend a budget as well as they can."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import squamata
from squamata.errors import SquamataError
from squamata.evaluate.size import bytes_by_part
from squamata.hardware import estimate
from squamata.load.hub import bundled
from squamata.report.forms import CalibrationChoice, Forms, sites_at, units_of
from squamata.report.mixed import Choice, Mixer, Price, SearchPlan, evolve, greedy, search_mixture
from squamata.report.reference import Remembering, beginning
from squamata.report.sensitivity import Judge, Sensitivity, measure_sensitivity, measure_units
from squamata.report.verbs import Verbs
from squamata.spec.recipe import Recipe

DRAWN = CalibrationChoice(bundled() / "calibration.jsonl", 4, 48)
IDS = torch.randint(8192, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def forms(verbs: Verbs) -> Forms:
    return Forms("bundled", {"low": Recipe.read("w4a8"), "high": Recipe.read("quamba-w8a8")}, DRAWN, verbs)


@pytest.fixture(scope="module")
def judge(verbs: Verbs) -> Judge:
    return Judge.of("bundled", bundled() / "excerpt.jsonl", verbs, window=32, max_tokens=128)


@pytest.fixture(scope="module")
def measured(forms: Forms, judge: Judge) -> Sensitivity:
    """Of every layer in the form *low*."""
    return measure_sensitivity(forms, "low", "layer", judge)


def quantized(recipe: Any, folder: Path) -> Any:
    squamata.quantize("bundled", recipe, folder, DRAWN.text, DRAWN.samples, DRAWN.length, DRAWN.seed)
    return squamata.load(folder)


@pytest.mark.parametrize(("form", "recipe"), [("low", "w4a8"), ("high", "quamba-w8a8")])
def test_everything_toggled_is_the_quantized_model(forms: Forms, form: str, recipe: str, tmp_path: Path) -> None:
    whole = sites_at(units_of(forms[form].specs, "cell", forms.tied), form)
    expected = quantized(recipe, tmp_path / "made")
    made = forms.assemble(whole)
    assert torch.equal(made(IDS), expected(IDS))
    assert forms.bytes(whole) == bytes_by_part(expected)["total"]


def test_nothing_toggled_is_the_float_model(forms: Forms) -> None:
    torch.testing.assert_close(forms.assemble({})(IDS), squamata.load("bundled", mode="float")(IDS), rtol=0, atol=2e-3)


def test_one_site_is_a_recipe_of_that_site_alone(forms: Forms, tmp_path: Path) -> None:
    """The toggled model against one that the pipeline quantizes at that site only."""
    for site in ("*.mixer.u", "layers.3.mixer.out_proj.weight"):
        sites = [name for name in forms["low"].specs if name.endswith(site.removeprefix("*"))]
        specs = {name: forms["low"].specs[name] for name in sites}
        recipe = forms.recipe(specs, "alone")
        expected = quantized(recipe, tmp_path / site.replace("*", "all"))
        assert set(expected.specs) == set(sites)
        assert torch.equal(forms.assemble(dict.fromkeys(sites, "low"))(IDS), expected(IDS))


def test_units_cover_every_site_once(forms: Forms) -> None:
    specs = forms["low"].specs
    for per in ("site", "layer", "cell"):
        units = units_of(specs, per, tied=True)
        members = [site for sites in units.values() for site in sites]
        assert sorted(members) == sorted(set(specs) - {"head.weight"})
    assert len(units_of(specs, "layer", tied=True)) == 8 + 2 and "mixer.u" in units_of(specs, "site", tied=True)
    assert "head.weight" in units_of(specs, "site", tied=False)
    with pytest.raises(SquamataError, match="site, layer or cell"):
        units_of(specs, "channel", tied=True)


def test_the_ranking_is_that_of_single_evaluations(
    forms: Forms, judge: Judge, measured: Sensitivity, verbs: Verbs
) -> None:
    kl = [row.kl for row in measured.rows]
    assert kl == sorted(kl, reverse=True) and abs(measured.floor_kl) < 1e-6
    assert {row.unit for row in measured.rows} == set(units_of(forms["low"].specs, "layer", forms.tied))
    first = measured.rows[0]
    sites = units_of(forms["low"].specs, "layer", forms.tied)[first.unit]
    alone = forms.assemble(dict.fromkeys(sites, "low"))
    again = verbs.evaluate(alone, bundled() / "excerpt.jsonl", squamata.load("bundled"), 32, 128)
    assert (first.kl, first.perplexity, first.sites) == (again.kl, again.perplexity, len(sites))
    assert measured.together_kl > first.kl > 0 and first.bytes_saved > 0
    assert measure_units(forms, "low", {first.unit: sites}, judge) == {first.unit: first.kl}
    assert isinstance(judge.reference, Remembering) and judge.reference.computed == 1  # one batch, computed once


def test_a_mixture_is_the_recipe_that_it_emits(forms: Forms, tmp_path: Path) -> None:
    mixer = Mixer(forms, "low", "high", "layer")
    assert list(mixer.units) == [f"layers.{layer}" for layer in range(8)]  # head and embedding are alike in both
    chosen: Choice = frozenset(("layers.0", "layers.5"))
    recipe = mixer.recipe(chosen, "mixed")
    added = recipe.rules[len(forms["low"].recipe.rules) :]
    assert {rule.layers for rule in added} == {(0, 5)}
    path = tmp_path / "mixed.yaml"
    import yaml

    path.write_text(yaml.safe_dump(recipe.to_mapping(), sort_keys=False))
    made = quantized(path, tmp_path / "made")
    assert torch.equal(made(IDS), forms.assemble(mixer.sites(chosen))(IDS))
    assert bytes_by_part(made)["total"] == mixer.bytes(chosen) == mixer.base + sum(mixer.cost[unit] for unit in chosen)


def test_search_stays_within_the_budget(forms: Forms, judge: Judge, measured: Sensitivity) -> None:
    mixer = Mixer(forms, "low", "high", "layer")
    budget = mixer.base + 3 * max(mixer.cost.values()) + 10
    found = search_mixture(mixer, measured, SearchPlan(budget, judge, judge))
    nothing, chosen, evolved, everything = found.mixtures
    assert len(chosen.upgraded) == len(evolved.upgraded) == 3 and chosen.bytes <= budget and evolved.bytes <= budget
    assert chosen.evaluations == evolved.evaluations == 16 and everything.bytes > budget
    assert everything.kl < min(chosen.kl, evolved.kl) <= max(chosen.kl, evolved.kl) < nothing.kl
    assert found.best in ("greedy", "evolution") and found.verdict in ("better", "worse", "not significant")
    with pytest.raises(SquamataError, match="below the"):
        search_mixture(mixer, measured, SearchPlan(mixer.base - 1, judge, judge))


COST = {name: 3 + 7 * place % 11 for place, name in enumerate("abcdefgh")}
GAIN = {name: 1.0 + 5 * place % 7 for place, name in enumerate("abcdefgh")}


def best_gain(budget: int) -> float:
    subsets = itertools.chain.from_iterable(itertools.combinations(COST, size) for size in range(9))
    return max(sum(GAIN[u] for u in some) for some in subsets if sum(COST[u] for u in some) <= budget)


@pytest.mark.parametrize("budget", [0, 9, 20, 35, 1000])
def test_greedy_is_the_knapsack_heuristic(budget: int) -> None:
    taken = greedy(COST, GAIN, budget)
    best = best_gain(budget)
    got = sum(GAIN[unit] for unit in taken)
    assert sum(COST[unit] for unit in taken) <= budget
    assert got + max(GAIN.values()) >= best  # Dantzig's bound: at most one unit's gain is lost
    assert greedy(COST, dict.fromkeys(COST, -1.0), budget) == frozenset()


def test_evolution_finds_the_best_subset_and_counts_its_calls() -> None:
    calls: list[Choice] = []

    def loss(choice: Choice) -> float:
        assert sum(COST[unit] for unit in choice) <= 24
        calls.append(choice)
        return -sum(GAIN[unit] for unit in choice)

    best = evolve(COST, loss, 24, 140)
    assert len(calls) == len(set(calls)) <= 140
    assert sum(GAIN[unit] for unit in best) == pytest.approx(best_gain(24))
    calls.clear()
    few = evolve(COST, loss, 24, 10, seed=3)
    assert len(calls) <= 10 and few in calls and evolve(COST, loss, 24, 10, seed=3) == few
    assert evolve(COST, loss, 0, 10) == frozenset()


def test_a_remembered_model_gives_the_same_and_forgets_beyond_its_budget() -> None:
    model = squamata.load("bundled")
    kept = Remembering(model, budget=2 * 40 * 8192 * 4)
    assert torch.equal(kept(IDS), model(IDS)) and torch.equal(kept(IDS), model(IDS)) and kept.computed == 1
    other = IDS.flip(0)
    assert torch.equal(kept(other), model(other)) and torch.equal(kept(other), model(other)) and kept.computed == 3
    assert kept.config is model.config


def test_a_remembered_model_steps_as_the_model_does() -> None:
    """Also where its memory ends in the middle of a sequence, and where two sequences begin alike."""
    model = squamata.load("bundled")
    kept = Remembering(model, budget=2 * 5 * 8192 * 4)  # five steps of two sequences
    sequences = [IDS[:, :8], torch.cat([IDS[:, :3], IDS[:, 9:14]], dim=1)]
    for again in range(2):
        for ids in sequences:
            cache, expected = kept.new_cache(2), model.new_cache(2)
            for place in range(8):
                assert torch.equal(kept.step(ids[:, place], cache), model.step(ids[:, place], expected)), again
    assert kept.computed == (8 + 5) + (3 + 5)  # 5 kept; 3 of those are shared by both sequences


def test_the_beginning_of_a_text_is_enough(judge: Judge, verbs: Verbs) -> None:
    document = "word " * 20000
    short = beginning([document], 64)
    assert len(short[0]) < len(document)
    model = squamata.load("bundled")
    cut, whole = (verbs.evaluate(model, some, None, 32, 64) for some in (short, [document]))
    assert (cut.nats_per_token, cut.bits_per_byte) == (whole.nats_per_token, whole.bits_per_byte)


def test_a_budget_of_the_chip_is_kept(forms: Forms, judge: Judge, measured: Sensitivity) -> None:
    """DRAM traffic adds up exactly; what energy the best mixture really takes is within the budget."""
    kilobytes = Price("kB a token", lambda config, recipe: estimate(config, recipe).dram_bytes_per_token / 1e3)
    mixer = Mixer(forms, "low", "high", "layer", kilobytes)
    chosen: Choice = frozenset(("layers.0", "layers.5"))
    assert mixer.price(chosen) == pytest.approx(mixer.base + sum(mixer.cost[unit] for unit in chosen), rel=1e-12)
    millijoules = Price("mJ a token", lambda config, recipe: estimate(config, recipe).energy_per_token_nj / 1e6)
    mixer = Mixer(forms, "low", "high", "layer", millijoules)
    budget = mixer.base + 2.5 * max(mixer.cost.values())
    found = search_mixture(mixer, measured, SearchPlan(budget, judge, judge))
    assert (found.budget, found.unit) == (budget, "mJ a token")
    for name in ("greedy", "evolution"):
        assert mixer.base < found.mixture(name).price <= budget and len(found.mixture(name).upgraded) == 2
