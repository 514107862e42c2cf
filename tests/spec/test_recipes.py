"""Recipes: those we ship, how rules meet sites, and what is said of mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from squamata.errors import SquamataError
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe, recipe_folder, recipe_names
from squamata.spec.sites import BLOCKS, all_sites

INT8 = {"bits": 8}


def recipe(*rules: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.from_mapping({"name": "mine", "rules": list(rules)} | fields)


def refused(mapping: Any) -> str:
    with pytest.raises(SquamataError) as caught:
        Recipe.from_mapping(mapping, origin="mine.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def illegal(*rules: dict[str, Any], blocks: tuple[str, ...] = ("mamba2", "mamba2")) -> str:
    with pytest.raises(SquamataError) as caught:
        recipe(*rules).resolve(blocks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_file_in_the_folder_is_a_recipe() -> None:
    assert {path.stem for path in recipe_folder().glob("*.yaml")} == set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_resolve_and_round_trip(name: str) -> None:
    shipped = Recipe.read(name)
    assert shipped.name == name and shipped.description
    for kind in shipped.architectures:
        specs = shipped.resolve((kind,) * 3)
        assert bool(specs) == (name != "float")
        stored = json.loads(json.dumps(shipped.to_mapping()))
        again = Recipe.from_mapping(stored)
        assert again == shipped and again.resolve((kind,) * 3) == specs
        assert again.to_mapping() == shipped.to_mapping()


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_what_quamba_w8a8_quantizes(kind: str) -> None:
    specs = Recipe.read("quamba-w8a8").resolve((kind,))
    every = {site for site, info in all_sites((kind,)).items() if not info.on_request}
    left = {"layers.0.mixer.y"} | ({"layers.0.mixer.dt_bias"} if kind == "mamba2" else set())
    assert every - set(specs) == left  # y is float through gate and rotation
    assert {spec.bits for spec in specs.values()} == {8}
    u, state = specs["layers.0.mixer.u"], specs["layers.0.mixer.state"]
    assert (u.scale.strategy, u.rounding, u.dynamic) == ("percentile", "half-away", False)
    assert (str(state.granularity), state.rounding, state.dynamic) == ("channel", "half-even", True)
    upstream = Recipe.read("quamba-w8a8-static-state").resolve((kind,))
    state = upstream.pop("layers.0.mixer.state")
    assert (state.scale.strategy, str(state.granularity), state.dynamic) == ("percentile", "tensor", False)
    assert upstream.items() <= specs.items()
    clipped = {name for name, spec in specs.items() if spec.scale.strategy == "percentile"}
    assert clipped == {"layers.0.mixer.u"}


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_what_w4a16_quantizes(kind: str) -> None:
    specs = Recipe.read("w4a16").resolve((kind,))
    assert {str(spec.granularity) for spec in specs.values()} == {"group(128)"}
    names = {"in_proj", "out_proj"} | ({"x_proj"} if kind == "mamba1" else set())
    assert set(specs) == {f"layers.0.mixer.{name}.weight" for name in names}


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_ptq4vms_parts_are_the_projections_and_what_they_read(kind: str) -> None:
    shipped = Recipe.read("lnorm-w8a8")
    specs = shipped.resolve((kind,))
    weights = {site for site, info in all_sites((kind,)).items() if info.reads and site != "head.weight"}
    own = {"u_proj", "dt_low"} if kind == "mamba1" else set()
    assert set(specs) == weights | {f"layers.0.mixer.{site}" for site in {"in", "out"} | own}
    assert {specs[site].describe() for site in weights} == {"int8 per channel, lnorm"}
    assert {specs[site].describe() for site in set(specs) - weights} == {"int8 asymmetric per tensor, lnorm"}
    assert [named.name for named in (*shipped.transforms, shipped.tune) if named] == ["smooth", "lsq"]


MOVING = "percentile(alpha=0.9995, ema=0.01)"
UPSTREAM = {  # site -> granularity, scale, rounding of int8, by its modelutils_mamba.py, qMambaLayer.py and qMamba2.py
    "mamba1": {
        "mixer.u": ("tensor", MOVING, "half-away"),
        "mixer.state": ("tensor", MOVING, "half-away"),
        "mixer.out": ("tensor", "minmax", "truncate"),
    },
    "mamba2": {
        "mixer.u": ("index", "minmax", "half-away"),
        "mixer.B_conv": ("ssd_group", "minmax", "half-away"),
        "mixer.C_conv": ("ssd_group", "minmax", "half-away"),
        "mixer.state": ("index,state", "minmax", "half-away"),
        "mixer.out": ("tensor", "minmax", "truncate"),
        "mixer.in_proj.weight": ("segment", "minmax", "half-even"),
        "mixer.conv.weight": ("segment", "minmax", "half-even"),
        "mixer.conv.bias": ("segment", "minmax", "half-even"),
    },
}


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_like_upstream_is_what_its_code_does(kind: str) -> None:
    specs = Recipe.read("quamba2-w8a8-like-upstream").resolve((kind,))
    left = {"layers.0.mixer.y"} | ({"layers.0.mixer.dt_bias"} if kind == "mamba2" else set())
    assert set(specs) == {site for site, info in all_sites((kind,)).items() if not info.on_request} - left
    segments = ("segment", "minmax", "half-even") if kind == "mamba1" else None  # of one part: a tensor
    for site, spec in specs.items():
        short = site.removeprefix("layers.0.")
        plain = ("channel" if site == "embedding.weight" else "tensor", "minmax", "half-even")
        plain = segments if segments and short.startswith("mixer.conv.") else plain
        granularity, scale, rounding = UPSTREAM[kind].get(short, plain)
        assert (spec.describe(), spec.rounding) == (f"int8 per {granularity}, {scale}", rounding), site


def test_like_upstream_quantizes_a_mamba1_alike_in_both_papers() -> None:
    """Its code reorders nothing there: --group_heads is for Mamba-2."""
    first, second = (Recipe.read(f"{name}-w8a8-like-upstream").resolve(("mamba1",)) for name in ("quamba", "quamba2"))
    assert {site: spec for site, spec in second.items() if site.startswith("layers.")} == first
    four = Recipe.read("quamba2-w4a8-like-upstream").resolve(("mamba1",))
    other = {site.rpartition("mixer.")[2] for site, spec in second.items() if four[site] != spec}
    assert other == {"embedding.weight", "head.weight"} | {f"{name}_proj.weight" for name in ("in", "x", "out")}


def test_float_head_leaves_embedding_and_head() -> None:
    specs = Recipe.read("quamba-w8a8-float-head").resolve(("mamba1",))
    assert not [name for name in specs if not name.startswith("layers.")]


def test_the_last_match_wins_and_float_takes_back() -> None:
    specs = recipe(
        {"site": "*.mixer.*", "spec": INT8},
        {"site": "*.mixer.u", "spec": {"bits": 4}},
        {"site": "*.mixer.state", "spec": "float"},
        {"site": "*.mixer.z", "spec": {"bits": 5}},
        {"site": "*.mixer.[zx]", "spec": {"bits": 6}},
    ).resolve(("mamba2",))
    bits = {name: specs[f"layers.0.mixer.{name}"].bits for name in ("u", "z", "x", "B")}
    assert bits == {"u": 4, "z": 6, "x": 6, "B": 8} and "layers.0.mixer.state" not in specs
    assert "head.in" not in specs


def test_layers_and_architectures_narrow_a_rule() -> None:
    rules = (
        {"site": "*.mixer.in", "spec": INT8, "layers": [0, 11]},
        {"site": "*.mixer.out", "spec": INT8, "architectures": ["mamba1"]},
        {"site": "head.in", "spec": {"bits": 7}},
    )
    assert set(recipe(*rules).resolve(("mamba2",) * 12)) == {"layers.0.mixer.in", "layers.11.mixer.in", "head.in"}
    hybrid = recipe(*rules).resolve(("mamba2",) * 11 + ("mamba1",))
    assert set(hybrid) == {"layers.0.mixer.in", "layers.11.mixer.in", "layers.11.mixer.out", "head.in"}


def test_layer_one_is_not_layer_eleven() -> None:
    specs = recipe({"site": "layers.1.*.u", "spec": INT8}).resolve(("mamba2",) * 12)
    assert list(specs) == ["layers.1.mixer.u"]


def test_extends_puts_the_parents_rules_first(tmp_path: Path) -> None:
    child = {"name": "child", "extends": "w8a8", "rules": [{"site": "*.mixer.u", "spec": "float"}]}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    specs, parent = Recipe.read(tmp_path / "child.yaml").resolve(("mamba1",)), Recipe.read("w8a8").resolve(("mamba1",))
    assert set(parent) - set(specs) == {"layers.0.mixer.u"} and specs.items() <= parent.items()


def test_extends_in_a_circle(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nextends: {tmp_path / parent}.yaml\n")
    for start in "abc":
        with pytest.raises(SquamataError, match="circle"):
            Recipe.read(tmp_path / f"{start}.yaml")
    (tmp_path / "self.yaml").write_text(f"name: self\nextends: {tmp_path}/self.yaml\n")
    with pytest.raises(SquamataError, match="circle"):
        Recipe.read(tmp_path / "self.yaml")


def test_extends_a_neighbour_by_a_relative_path(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nrules: [{site: head.in, spec: {bits: 8}}]\n")
    (tmp_path / "child.yaml").write_text("name: child\nextends: base.yaml\n")
    assert list(Recipe.read(tmp_path / "child.yaml").resolve(("mamba1",))) == ["head.in"]


def test_named_specs_of_parent_and_child() -> None:
    mapping = {
        "name": "mine",
        "extends": "w8a8",
        "specs": {"own": {"bits": 5}},
        "rules": [{"site": "*.mixer.u", "spec": "own"}, {"site": "*.mixer.z", "spec": "int8"}],
    }
    specs = Recipe.from_mapping(mapping).resolve(("mamba2",))
    assert specs["layers.0.mixer.u"].bits == 5 and specs["layers.0.mixer.z"] == QuantSpec(bits=8)


def write_parent(folder: Path) -> None:
    parent = {
        "name": "parent",
        "description": "the parent's",
        "architectures": ["mamba2"],
        "calibration": {"samples": 7, "length": 9},
        "specs": {"own": {"bits": 5}},
        "rules": [{"site": "*.mixer.u", "spec": "own"}],
    }
    (folder / "parent.yaml").write_text(yaml.safe_dump(parent))


def child_of_parent(folder: Path, **fields: Any) -> Recipe:
    write_parent(folder)
    return Recipe.from_mapping({"extends": "parent.yaml"} | fields, origin=str(folder / "child.yaml"))


def test_a_child_has_its_own_name_and_description(tmp_path: Path) -> None:
    child = child_of_parent(tmp_path, name="child")
    assert (child.name, child.description, child.architectures) == ("child", "", ("mamba2",))
    with pytest.raises(SquamataError, match=r"child\.yaml: name: is missing"):
        child_of_parent(tmp_path)


def test_calibration_says_only_what_differs(tmp_path: Path) -> None:
    calibration = child_of_parent(tmp_path, name="child", calibration={"samples": 3, "batch": 2}).calibration
    assert (calibration.samples, calibration.length, calibration.batch) == (3, 9, 2)
    with pytest.raises(SquamataError, match="calibration"):
        child_of_parent(tmp_path, name="child", calibration=5)


def test_a_name_given_again_leaves_the_parents_rules(tmp_path: Path) -> None:
    rules = [{"site": "*.mixer.z", "spec": "own"}]
    specs = child_of_parent(tmp_path, name="child", specs={"own": {"bits": 3}}, rules=rules).resolve(("mamba2",))
    assert (specs["layers.0.mixer.u"].bits, specs["layers.0.mixer.z"].bits) == (5, 3)
    assert child_of_parent(tmp_path, name="child", rules=rules).resolve(("mamba2",))["layers.0.mixer.z"].bits == 5


def test_reading_leaves_the_mapping_as_it_was() -> None:
    mapping = {"name": "mine", "specs": {"a": {"bits": 8}}, "rules": [{"site": "head.in", "spec": "a"}]}
    before = copy.deepcopy(mapping)
    Recipe.from_mapping(mapping)
    assert mapping == before


RULE = {"site": "head.in", "spec": INT8}
MISTAKES = {
    "top-key": ({"name": "m", "rulez": []}, ["rulez", "'rules'"]),
    "rule-key": ({"name": "m", "rules": [RULE | {"layer": [1]}]}, ["layer", "'layers'"]),
    "spec-key": ({"name": "m", "rules": [RULE | {"spec": {"bits": 8, "symetric": True}}]}, ["symetric", "'symmetric'"]),
    "calibration-key": ({"name": "m", "calibration": {"sample": 4}}, ["sample", "'samples'"]),
    "calibration-value": ({"name": "m", "calibration": {"samples": 0}}, ["calibration.samples"]),
    "scale-key": (
        {"name": "m", "rules": [RULE | {"spec": {"bits": 8, "scale": {"strategy": "minmax", "parameter": {}}}}]},
        ["parameter", "'parameters'"],
    ),
    "bits": ({"name": "m", "rules": [RULE | {"spec": {"bits": 17}}]}, ["rules.0.spec", "bits"]),
    "bits-words": (
        {"name": "m", "extends": "w8a8", "rules": [RULE | {"spec": {"bits": "eight"}}]},
        ["rules.0.spec.bits: must be a whole number, not 'eight'"],  # counted in this file, without the parent's
    ),
    "spec-blank": ({"name": "m", "rules": [RULE | {"spec": None}]}, ["rules.0.spec: is empty"]),
    "layers-word": ({"name": "m", "rules": [RULE | {"layers": "all"}]}, ["rules.0.layers: must be a list"]),
    "weights-in-a-rule": (
        {"name": "m", "rules": [RULE | {"spec": {"bits": 4, "weights": "gptq"}}]},
        ["rules.0.spec.weights", "recipe itself"],
    ),
    "bits-missing": ({"name": "m", "rules": [RULE | {"spec": {}}]}, ["rules.0.spec", "bits"]),
    "granularity": ({"name": "m", "rules": [RULE | {"spec": {"bits": 8, "granularity": "chanel"}}]}, ["chanel"]),
    "group-of-none": ({"name": "m", "rules": [RULE | {"spec": {"bits": 8, "granularity": "group(0)"}}]}, ["group"]),
    "spec-name": (
        {"name": "m", "specs": {"int8": INT8}, "rules": [{"site": "head.in", "spec": "int9"}]},
        ["int9", "'int8'"],
    ),
    "site-key": ({"name": "m", "rules": [{"sight": "head.in", "spec": INT8}]}, ["rules.0.sight", "'site'"]),
    "bits-key": ({"name": "m", "rules": [RULE | {"spec": {"bitz": 8}}]}, ["rules.0.spec.bitz", "'bits'"]),
    "kind": ({"name": "m", "rules": [RULE | {"kind": "activations"}]}, ["rules.0.kind", "'activation'"]),
    "scale-parameter": (
        {"name": "m", "rules": [RULE | {"spec": {"bits": 8, "scale": {"strategy": "percentile", "alpha": 0.9}}}]},
        ["rules.0.spec.scale.alpha", "{NAME: {alpha: VALUE}}"],
    ),
    "transform-parameter": (
        {"name": "m", "transforms": [{"name": "hadamard", "sites": []}]},
        ["transforms.0.sites", "{NAME: {sites: VALUE}}"],
    ),
    "unused-spec": ({"name": "m", "specs": {"int8": {"bitz": 8}}}, ["specs.int8.bitz", "'bits'"]),
    "unused-spec-value": ({"name": "m", "specs": {"int8": {"bits": 80}}}, ["specs.int8.bits"]),
    "spec-named-float": ({"name": "m", "specs": {"float": INT8}}, ["'float'"]),
    "no-name": ({"rules": []}, ["name"]),
    "rules-number": ({"name": "m", "rules": 5}, ["rules"]),
    "rules-words": ({"name": "m", "rules": ["head.in"]}, ["rules.0"]),
    "specs-list": ({"name": "m", "specs": [1], "extends": "w8a8"}, ["specs"]),
    "extends-list": ({"name": "m", "extends": ["w8a8"]}, ["extends"]),
    "extends-unknown": ({"name": "m", "extends": "w8a9"}, ["w8a9", "'w8a8'"]),
    "not-a-mapping": ([1, 2], ["mapping"]),
}


@pytest.mark.parametrize("case", list(MISTAKES))
def test_mistakes_are_one_line_that_names_them(case: str) -> None:
    mapping, words = MISTAKES[case]
    said = refused(mapping)
    assert all(word in said for word in words), said


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(SquamataError, match="did you mean 'quamba-w8a8'"):
        Recipe.read("quamba-w8a")
    with pytest.raises(SquamataError, match="no such recipe file"):
        Recipe.read(tmp_path / "none.yaml")
    for content in (b"rules: [", b"- a\n- b\n", b"\xff\xfe\x00", b""):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(SquamataError, match=r"bad\.yaml"):
            Recipe.read(tmp_path / "bad.yaml")
    with pytest.raises(SquamataError):
        Recipe.read(tmp_path)


@pytest.mark.parametrize("site", ["in", "out"])
def test_no_scale_along_a_summed_axis(site: str) -> None:
    for granularity in ("channel", "group(16)"):
        said = illegal({"site": f"*.mixer.{site}", "spec": {"bits": 8, "granularity": granularity}})
        assert f"layers.0.mixer.{site}" in said and "sums over channel" in said and granularity in said


@pytest.mark.parametrize("site", ["u", "dt_low"])
def test_mamba1_products_sum_over_u_and_dt_low(site: str) -> None:
    rule = {"site": f"*.mixer.{site}", "spec": {"bits": 8, "granularity": "channel"}, "architectures": ["mamba1"]}
    assert "sums over channel" in illegal(rule, blocks=("mamba1",))


@pytest.mark.parametrize(
    ("site", "spec", "why"),
    [
        ("*.in_proj.weight", {"granularity": "in"}, "product sums over it"),
        ("*.in_proj.weight", {"dynamic": True}, "do not change at run time"),
        ("*.mixer.dt_bias", {"dynamic": True}, "do not change at run time"),
        ("*.mixer.in", {"granularity": "token"}, "dynamic: true"),
        ("*.mixer.u", {"granularity": "state"}, "no axis 'state'"),
        ("*.mixer.dt", {"granularity": "ssd_group"}, "no axis 'ssd_group'"),
        ("*.mixer.conv.weight", {"granularity": "head"}, "no axis 'head'"),
        ("*.mixer.u", {"granularity": "segment"}, "segment"),
        ("*.mixer.state", {"granularity": "token", "dynamic": True}, "token"),
        ("*.mixer.in", {"dynamic": True}, "add 'token'"),
        ("*.mixer.z", {"granularity": "channel", "dynamic": True}, "add 'token'"),
        ("head.in", {"dynamic": True}, "add 'token'"),
        ("*.in_proj.weight", {"granularity": "index"}, "an index is for"),
        ("*.mixer.conv.weight", {"granularity": "index"}, "an index is for"),
        ("*.mixer.z", {"granularity": "index"}, "has no index map"),
        ("*.mixer.B_conv", {"granularity": "index"}, "has no index map"),
        ("*.in_proj.weight", {"granularity": "segment,group(128)"}, "group"),
        ("*.mixer.nothing", {}, "no site matches"),
    ],
)
def test_illegal_granularities_are_refused_with_the_reason(site: str, spec: dict[str, Any], why: str) -> None:
    assert why in illegal({"site": site, "spec": INT8 | spec})


@pytest.mark.parametrize("site", ["B", "C"])
def test_channel_of_a_site_without_channels_is_refused(site: str) -> None:
    rule = {"site": f"*.mixer.{site}", "spec": {"bits": 8, "granularity": "channel"}}
    assert "no axis 'channel' (its axes: state)" in illegal(rule, blocks=("mamba1",))
    assert list(recipe(rule).resolve(("mamba2",))) == [f"layers.0.mixer.{site}"]  # there: one a group


def test_run_time_scales_that_are_legal() -> None:
    """Of every token; a state keeps its sequences apart by itself."""
    rules = (
        {"site": "*.mixer.in", "spec": {"bits": 8, "granularity": "token", "dynamic": True}},
        {"site": "*.mixer.z", "spec": {"bits": 8, "granularity": "token,channel", "dynamic": True}},
        {"site": "*.mixer.state", "spec": {"bits": 8, "dynamic": True}},
    )
    specs = recipe(*rules).resolve(("mamba2",))
    assert len(specs) == 3 and recipe(*rules).static_sites(("mamba2",)) == {}


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_static_sites_are_those_that_need_calibration(kind: str) -> None:
    shipped, infos = Recipe.read("quamba-w8a8"), all_sites((kind,))
    static = shipped.static_sites((kind,))
    assert "layers.0.mixer.u" in static and "layers.0.mixer.state" not in static
    assert {infos[site].kind for site in static} == {"activation"}
    assert "layers.0.mixer.state" in Recipe.read("quamba-w8a8-static-state").static_sites((kind,))
    assert Recipe.read("w4a16").static_sites((kind,)) == {}


def test_a_kind_narrows_a_rule() -> None:
    specs = recipe({"site": "*.mixer.*", "spec": INT8, "kind": "activation"}).resolve(("mamba2",))
    infos = all_sites(("mamba2",))
    always = {name: info for name, info in infos.items() if not info.on_request}
    assert set(specs) == {name for name, info in always.items() if "mixer" in name and info.kind == "activation"}
    assert "of kind state" in illegal({"site": "*.mixer.u", "spec": INT8, "kind": "state"})
    assert recipe({"site": "*.u", "spec": INT8, "kind": "activation"}).to_mapping()["rules"][0]["kind"] == "activation"


@pytest.mark.parametrize(
    ("site", "granularity"),
    [
        ("*.mixer.u", "head,channel"),
        ("*.mixer.state", "head,channel"),
        ("*.mixer.state", "state"),
        ("*.mixer.B_conv", "ssd_group"),
        ("*.mixer.z", "channel"),
        ("*.in_proj.weight", "group(128)"),
        ("*.in_proj.weight", "segment"),
        ("embedding.weight", "channel"),
    ],
)
def test_what_survives_a_product_is_legal(site: str, granularity: str) -> None:
    specs = recipe({"site": site, "spec": {"bits": 8, "granularity": granularity}}).resolve(("mamba2",))
    assert [str(spec.granularity) for spec in specs.values()] == [granularity]


def test_a_key_given_twice_is_refused_in_every_mapping(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    for content, said in (
        ("name: m\nrules: []\ndescription: x\nrules: []\n", r"'rules' twice, line 4"),
        ("name: m\nspecs: {a: {bits: 8, bits: 4}}\n", r"'bits' twice, line 2"),
    ):
        path.write_text(content)
        with pytest.raises(SquamataError, match=said):
            Recipe.read(path)
    path.write_text("name: m\nspecs:\n  a: &a {bits: 8}\n  b: {<<: *a, bits: 4}\nrules: [{site: head.in, spec: b}]\n")
    spec = Recipe.read(path).rules[0].spec  # a merged key may be given again: that is what merging is for
    assert spec is not None and spec.bits == 4


def test_a_misspelt_site_names_the_nearest() -> None:
    assert "(did you mean '*.mixer.u'?)" in illegal({"site": "*.mixer.uu", "spec": INT8})
    assert "(did you mean 'head.weight'?)" in illegal({"site": "head.weigth", "spec": INT8})
    assert "is of kind weight" in illegal({"site": "*.mixer.u", "spec": INT8, "kind": "weight"})
    assert "to its last word" in illegal({"site": "*.mixer.deca*", "spec": INT8})


def test_a_rule_that_can_never_match_is_refused() -> None:
    assert "layer 7" in illegal({"site": "*.mixer.u", "spec": INT8, "layers": [0, 7]})
    said = refused({"name": "m", "rules": [{"site": "*.mixer.u", "spec": INT8, "architectures": ["mamba3"]}]})
    assert "mamba3" in said and "mamba" in said.split("mamba3")[1]
    assert "mambo2" in refused({"name": "m", "architectures": ["mambo2"]})


KEPT = {"bits": 8, "granularity": "token", "dynamic": True, "keep": {"above": 6.0}}


def test_channels_are_kept_where_a_product_reads_them() -> None:
    specs = recipe({"site": "*.mixer.out", "spec": KEPT}).resolve(("mamba2",))
    assert specs["layers.0.mixer.out"].describe() == "int8 per token, dynamic, channels that reach 6 in float"
    assert not specs["layers.0.mixer.out"].linear_grid and specs["layers.0.mixer.out"].integer_grid
    assert "'keep' is for the input of a product" in illegal({"site": "*.mixer.y", "spec": KEPT})
    assert "'keep' is for the input of a product" in illegal({"site": "*.in_proj.weight", "spec": KEPT})
    static = {"bits": 8, "keep": {"above": 6.0}}
    assert "add 'granularity: token' and 'dynamic: true'" in illegal({"site": "*.mixer.in", "spec": static})
    for wrong, said in (
        ({"above": 0}, "keep.above: must be greater than 0"),
        ({"over": 6.0}, "unknown key"),
    ):
        assert said in refused({"name": "a", "rules": [{"site": "*.mixer.in", "spec": KEPT | {"keep": wrong}}]})
    for other in ({"symmetric": False}, {"bits": 9}):
        assert "'keep' goes with" in refused({"name": "a", "rules": [{"site": "*.mixer.in", "spec": KEPT | other}]})


def test_groups_along_a_products_input_must_be_those_of_its_weight() -> None:
    keep = {"channels": 128}
    rows = {"bits": 4, "granularity": "group(128)", "keep": keep}
    tokens = {"bits": 4, "granularity": "token,group(128)", "dynamic": True, "keep": keep}

    def both(x: dict[str, Any], weight: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"site": "*.mixer.out", "spec": x}, {"site": "*.out_proj.weight", "spec": weight}

    specs = recipe(*both(tokens, rows)).resolve(("mamba2",))
    assert specs["layers.0.mixer.out"].group_sizes(300) == specs["layers.0.mixer.out_proj.weight"].group_sizes(300)
    assert specs["layers.0.mixer.out"].group_sizes(300) == [128, 44, 128]
    assert specs["layers.0.mixer.out"].group_sizes(100) == [100]
    plain = {key: value for key, value in tokens.items() if key != "keep"}
    recipe(*both(plain, {"bits": 8, "granularity": "group(128)"})).resolve(("mamba1",))
    for x, weight in (
        (tokens, rows | {"granularity": "group(64)"}),
        (tokens, rows | {"keep": {"channels": 64}}),
        (tokens, rows | {"keep": {"channels": 128, "bits": 6}}),
        (plain, rows),
        (plain, {"bits": 8, "granularity": "channel"}),
        (plain, {"bits": 4, "granularity": "group(128)", "second_level": True}),
        ({"bits": 8}, rows),
    ):
        said = illegal(*both(x, weight))
        assert "summed apart, so both need the same group(N) and 'keep'" in said and "out_proj.weight" in said
    for one in both(tokens, rows):  # the other operand is float: what is rounded is dequantized first
        recipe(one).resolve(("mamba2",))
    apart = {"site": "*.mixer.u_proj", "spec": plain}, {"site": "*.x_proj.weight", "spec": {"bits": 4}}
    assert "layers.0.mixer.u_proj: a scale per token,group(128)" in illegal(*apart, blocks=("mamba1",))
    assert "sorted" in illegal({"site": "head.in", "spec": tokens})
    assert "sorted" in illegal({"site": "*.x_proj.weight", "spec": rows}, blocks=("mamba1",))
    assert "add 'group(N)'" in illegal({"site": "*.mixer.in", "spec": tokens | {"granularity": "token"}})
    static = {"bits": 4, "granularity": "group(128)"}
    assert "or at run time 'token,group(N)'" in illegal({"site": "*.mixer.in", "spec": static})
    for wrong in ({"channels": 8, "above": 6.0}, {"bits": 8}, {"above": 6.0, "bits": 4}):
        assert "'keep" in refused({"name": "a", "rules": [{"site": "*.mixer.in", "spec": tokens | {"keep": wrong}}]})
    assert "'clip' goes with" in refused(
        {"name": "a", "rules": [{"site": "*", "spec": {"bits": 8, "clip": 0.9, "symmetric": False}}]}
    )
    assert QuantSpec(bits=4, clip=0.5).describe() == "int4 per tensor, minmax cut at 0.5"
