"""What rows a study file asks for, and what it is refused for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from squamata.errors import SquamataError
from squamata.load.hub import bundled
from squamata.load.source import open_source
from squamata.report.plan import Places, RowPlan, Study, plan_rows
from squamata.report.rules import rules_for
from squamata.report.verbs import Verbs
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe, recipe_names

Write = Callable[..., Path]
U99 = {"name": "u 0.99", "changes": [{"site": "*.mixer.u", "set": {"scale": {"percentile": {"alpha": 0.99}}}}]}


def plan(path: Path, verbs: Verbs, **places: Path) -> tuple[list[RowPlan], list[str]]:
    return plan_rows(Study.read(path), Places(path, **places), verbs)


def test_the_grid_is_walked_in_order(write_study: Write, verbs: Verbs) -> None:
    rows, notes = plan(write_study(recipes=["float", "quamba-w8a8"], seeds=[3, 1]), verbs)
    assert [(row.labels["recipe"], row.seed) for row in rows] == [
        ("float", 3),
        ("float", 1),
        ("quamba-w8a8", 3),
        ("quamba-w8a8", 1),
    ]
    assert notes == [] and len({row.id for row in rows}) == 4


def test_an_override_changes_what_it_says_and_nothing_else(write_study: Write, verbs: Verbs) -> None:
    overrides = [
        {"name": "as it is"},
        U99,
        {"name": "float state", "rules": [{"site": "*.mixer.state", "spec": "float"}]},
    ]
    rows, notes = plan(write_study(recipes=["quamba-w8a8", "w4a16"], overrides=overrides), verbs)
    blocks = open_source("bundled").config.blocks
    plain, clipped, float_state = (row.recipe.resolve(blocks) for row in rows[:3])
    assert clipped["layers.3.mixer.u"] == plain["layers.3.mixer.u"].model_copy(
        update={"scale": clipped["layers.3.mixer.u"].scale}
    )
    assert clipped["layers.3.mixer.u"].scale.parameters == {"alpha": 0.99}
    assert {site for site in plain if plain[site] != clipped[site]} == {f"layers.{n}.mixer.u" for n in range(8)}
    assert set(plain) - set(float_state) == {f"layers.{n}.mixer.state" for n in range(8)}
    # w4a16 has neither a quantized u nor a quantized state: one row is enough for all three
    assert [row.labels["override"] for row in rows[3:]] == ["as it is"] and len(notes) == 2
    assert "equals bundled, w4a16, as it is, seed 0" in notes[0]


def test_recipes_that_differ_in_tuner_alone_are_two_rows(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    (tmp_path / "learned.yaml").write_text("name: learned\nextends: quamba-w8a8\ntune: lsq\n")
    rows, notes = plan(write_study(recipes=["quamba-w8a8", "learned.yaml"]), verbs)
    assert [row.labels["recipe"] for row in rows] == ["quamba-w8a8", "learned.yaml"] and notes == []


def test_overrides_for_some_recipes_and_calibration(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text((bundled() / "excerpt.jsonl").read_text())
    overrides = [
        {"name": "few", "calibration": {"batch": 2}, "recipes": ["quamba-w8a8"]},
        {"name": "elsewhere", "calibration_text": "other.jsonl"},
    ]
    path = write_study(recipes=["quamba-w8a8", "w4a16"], overrides=overrides, samples=None)
    rows, _ = plan(path, verbs, data=tmp_path)
    assert [tuple(row.labels.values())[1:] for row in rows] == [
        ("quamba-w8a8", "few"),
        ("quamba-w8a8", "elsewhere"),
        ("w4a16", "elsewhere"),
    ]
    assert rows[0].recipe.calibration.batch == 2 and rows[0].recipe.calibration.samples == 128
    assert rows[1].calibration == str(other) and rows[0].calibration == str(bundled() / "calibration.jsonl")
    assert rows[0].description["calibration_sha256"] != rows[1].description["calibration_sha256"]


def test_the_id_depends_on_content_and_not_on_paths(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "one text that is long enough"}\n')
    first = plan(write_study(text={"t": str(text)}), verbs)[0]
    moved = text.rename(tmp_path / "b.jsonl")
    second = plan(write_study(text={"t": str(moved)}), verbs)[0]
    assert [row.id for row in first] == [row.id for row in second]
    moved.write_text('{"text": "another text that is long enough"}\n')
    third = plan(write_study(text={"t": str(moved)}), verbs)[0]
    window = plan(write_study(text={"t": str(moved)}, window=16), verbs)[0]
    assert len({rows[0].id for rows in (first, third, window)}) == 3
    assert str(tmp_path) not in str(first[0].description)


def test_recipes_of_another_architecture_are_left_out(write_study: Write, verbs: Verbs, tmp_path: Path) -> None:
    (tmp_path / "only1.yaml").write_text("name: only1\nextends: w8a8\narchitectures: [mamba1]\n")
    rows, notes = plan(write_study(recipes=["float", "only1.yaml"]), verbs)
    assert len(rows) == 1 and notes == ["bundled, only1.yaml: left out, the recipe is for mamba1"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"recipe": ["w8a8"]}, "unknown key 'recipe' (did you mean 'recipes'?)"),
        ({"overrides": [{"name": "x", "rule": []}]}, "unknown key 'overrides.0.rule' (did you mean 'rules'?)"),
        ({"overrides": [{"name": "x", "changes": [{"site": "*", "sets": {}}]}]}, "(did you mean 'set'?)"),
        ({"overrides": [{"name": "x"}, {"name": "x"}]}, "same name"),
        ({"overrides": [{"name": "x", "changes": [{"site": "*.uu", "set": {"bits": 4}}]}]}, "no site matches '*.uu'"),
        ({"overrides": [{"name": "x", "changes": [{"site": "*.u", "set": {"bit": 4}}]}]}, "(did you mean 'bits'?)"),
        ({"overrides": [{"name": "x", "changes": [{"site": "*.u", "set": {"bits": 40}}]}]}, "less than or equal to"),
        ({"overrides": [{"name": "x", "rules": [{"site": "*.nothing", "spec": "float"}]}]}, "no site matches"),
        ({"overrides": [{"name": "x", "calibration": {"sample": 3}}]}, "(did you mean 'samples'?)"),
        ({"overrides": [{"name": "x", "recipes": ["w4a8"]}]}, "no recipe of this study (did you mean 'w4a16'?)"),
        (  # also where there is nothing to change
            {"recipes": ["float"], "overrides": [{"name": "x", "changes": [{"site": "*.u", "set": {"bit": 4}}]}]},
            "(did you mean 'bits'?)",
        ),
        ({"recipes": ["w4a61"]}, "no recipe named 'w4a61'"),
        ({"recipes": []}, "recipes"),
        ({"modes": ["parallell"]}, "modes.0: must be 'parallel' or 'recurrent', not 'parallell'"),
        ({"models": []}, "models: is empty"),
        ({"modes": {"parallel": ["bundeled"]}}, "no text of this study (did you mean 'bundled'?)"),
        ({"modes": {"parallel": []}}, "name the texts"),
        ({"baseline": {"recipe": "float", "override": "other"}}, "no override of this study"),
        ({"models": ["a/m", "b/m"]}, "called the same"),
        ({"models": ["./nowhere"]}, "no such folder"),
        ({"text": "nowhere.txt"}, "no such file: nowhere.txt"),
        ({"max_tokens": 1}, "max_tokens"),
    ],
)
def test_bad_studies_are_refused_before_any_work(
    write_study: Write, verbs: Verbs, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(SquamataError) as caught:
        plan(write_study(**fields), verbs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_studies(tmp_path: Path) -> None:
    for content, said in (("[1", "not a readable YAML"), ("- a", "a YAML mapping"), ("name: x", "models")):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(SquamataError, match=said):
            Study.read(path)
    with pytest.raises(SquamataError, match="no such study file"):
        Study.read(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_rules_for_says_exactly_the_specs(name: str) -> None:
    """Written as rules and resolved again, any recipe's specs come back: also single sites and single layers."""
    recipe = Recipe.read(name)
    blocks = ("mamba2",) * 3 if "mamba2" in recipe.architectures else ("mamba1",) * 3
    specs = recipe.resolve(blocks)
    again = Recipe.from_mapping({"name": "again", "rules": rules_for(specs, len(blocks))})
    assert again.resolve(blocks) == specs
    some = {site: spec for place, (site, spec) in enumerate(specs.items()) if place % 3}
    assert Recipe.from_mapping({"name": "some", "rules": rules_for(some, len(blocks))}).resolve(blocks) == some


def test_rules_for_float_and_layer_lists() -> None:
    spec = QuantSpec(bits=4)
    rules = rules_for(
        {"layers.0.mixer.u": spec, "layers.2.mixer.u": spec, "layers.1.mixer.u": None, "head.in": None}, 3
    )
    assert rules == [
        {"site": "*.mixer.u", "spec": {"bits": 4}, "layers": [0, 2]},
        {"site": "*.mixer.u", "spec": "float", "layers": [1]},
        {"site": "head.in", "spec": "float"},
    ]


def test_shipped_studies_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "studies"
    files = sorted(folder.glob("*.yaml"))
    assert len(files) >= 6
    for path in files:
        study = Study.read(path)
        assert study.description and study.name == path.stem
        assert replace(Places(path)).model("bundled") == "bundled"
