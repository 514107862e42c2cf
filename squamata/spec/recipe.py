"""Recipes: ordered rules ``site glob -> QuantSpec | float`` (last match wins), plus transforms and calibration.

YAML form::

    name: quamba-w8a8
    description: one line
    extends: w8a8                      # another recipe, or a file beside this one; its rules come first
    architectures: [mamba1, mamba2]
    specs: {int8: {bits: 8}}           # names usable in the rules
    transforms: [hadamard]             # or {NAME: {PARAMETER: VALUE}}
    weights: rtn                       # weight quantizer
    tune: {lsq: {steps: 100}}          # train the static scales, a layer at a time; absent: they stay as found
    correct: {mean: {decay: 0.16}}     # what quantizing took from a layer's output on average becomes a bias; or absent
    calibration: {samples: 128, length: 512}
    rules:
      - {site: "*.mixer.u", spec: {bits: 8, scale: {percentile: {alpha: 0.9999}}}}
      - {site: "*.mixer.u", spec: float, layers: [0, 11], architectures: [mamba2]}
      - {site: "*.mixer.*", spec: int8, kind: activation}

``layers``: by number, from the end if negative. ``*.mixer.*`` without a ``kind`` (activation, state, weight or
parameter) also matches the state, the weights and small parameters such as ``conv.weight``, ``A_log`` and ``dt_bias``.

A recipe that extends another has its own ``name`` and ``description``. Its rules come after the parent's, whose named
specs it may use (a name that it gives again changes nothing in the parent's rules); of ``calibration`` it says only
what differs; ``architectures``, ``transforms``, ``weights``, ``tune`` and ``correct`` replace the parent's.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError

from squamata.errors import SquamataError, nearest
from squamata.spec.formats import FORMATS
from squamata.spec.groups import refuse_to_keep, refuse_unlike_groups
from squamata.spec.quant import Data, QuantSpec, ScaleSpec
from squamata.spec.sites import BLOCKS, Kind, SiteInfo, all_sites
from squamata.spec.yaml_file import SUFFIXES, Place, first_problem, read_yaml


def _spec_or_float(value: Any) -> Any:
    if value is None:
        raise ValueError("is empty: give a spec, or float")
    return None if value == "float" else value


SpecOrFloat = Annotated[
    QuantSpec | None,
    BeforeValidator(_spec_or_float),
    PlainSerializer(lambda spec: spec.model_dump(exclude_defaults=True) if spec else "float", return_type=dict | str),
]


def _known_architectures(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in BLOCKS:
            raise ValueError(f"no architecture named '{name}'{nearest(name, BLOCKS)}")
    return names


Architectures = Annotated[tuple[str, ...], AfterValidator(_known_architectures)]


class Rule(Data):
    """One line of a recipe: every site that matches is represented so."""

    site: str
    spec: SpecOrFloat
    layers: tuple[int, ...] | None = None
    architectures: Architectures | None = None
    kind: Kind | None = None

    def names(self, site: str, info: SiteInfo) -> bool:
        """True if glob and kind fit this full site name, in whatever layer and architecture.

        A site that exists only on request (``SiteInfo.on_request``) must be named to its last word.
        """
        if info.on_request and self.site.rpartition(".")[2] != site.rpartition(".")[2]:
            return False
        return self.kind in (None, info.kind) and fnmatchcase(site, self.site)

    def wanted(self, sites: dict[str, SiteInfo]) -> str:
        """What a rule that matches none of these asked for, and what it may have meant, for a message."""
        if any(fnmatchcase(site, self.site) for site in sites):
            return f"'{self.site}'" + (f" and is of kind {self.kind}" if self.kind else ": name it to its last word")
        globs = {site if not site.startswith("layers.") else "*." + site.split(".", 2)[2] for site in sites}
        return f"'{self.site}'{nearest(self.site, globs)}"

    def matches(self, site: str, info: SiteInfo, blocks: tuple[str, ...]) -> bool:
        """True if the rule speaks of this full site name in a model whose layers are of these kinds."""
        layer = int(site.split(".")[1]) if site.startswith("layers.") else None
        if self.architectures is not None and blocks[layer or 0] not in self.architectures:
            return False
        if self.layers is not None and (layer is None or not {layer, layer - len(blocks)} & set(self.layers)):
            return False
        return self.names(site, info)


class Calibration(Data):
    """How many documents, how many tokens of each, and how many at once."""

    samples: Annotated[int, Field(ge=1)] = 128
    length: Annotated[int, Field(ge=2)] = 512
    batch: Annotated[int, Field(ge=1)] = 8
    order: Literal["shuffled", "first"] = "shuffled"


def _named_parameters(value: Any) -> Any:
    """``hadamard`` or ``{hadamard: {...}}`` -> ``(name, parameters)``."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1 and "name" not in value:
        ((name, parameters),) = value.items()
        return {"name": name, "parameters": parameters or {}}
    return value


class Named(Data):
    """Name of a transform, weight quantizer, tuner or correction, and its parameters."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


NamedField = Annotated[Named, BeforeValidator(_named_parameters)]


DECAYS = ("decay", "chunk_decay")  # sites of numbers between 0 and 1
_ROWS = {"granularity": "channel"}
_GROUPS = {"granularity": "group(128)", "full_range": True, "scale_dtype": "float16"}
TABLE_FORMATS: dict[str, dict[str, Any]] = {  # of the embedding, a row of which is read alone, and of the head
    "float": {"embedding.weight": "float", "head.*": "float"},
    "int8": {"embedding.weight": {"bits": 8} | _ROWS, "head.weight": {"bits": 8} | _ROWS},
    "int4": {"embedding.weight": {"bits": 4} | _ROWS, "head.weight": {"bits": 4} | _GROUPS},
}


class Recipe(Data):
    """A whole quantization method as data. ``Recipe.read`` resolves ``extends`` and ``specs``."""

    name: str
    description: str = ""
    architectures: Architectures = tuple(BLOCKS)
    transforms: tuple[NamedField, ...] = ()
    weights: NamedField = Named(name="rtn")
    tune: NamedField | None = None
    correct: NamedField | None = None
    calibration: Calibration = Calibration()
    rules: tuple[Rule, ...] = ()

    @classmethod
    def read(cls, name_or_path: str | Path) -> Recipe:
        """Read a recipe by its name or from a YAML file.

        Raises SquamataError for an unknown name, an unknown key or a value that is out of range.
        """
        return cls.from_mapping(_read_yaml(name_or_path), origin=str(name_or_path))

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Build a recipe from parsed YAML or JSON; resolves ``extends`` and named ``specs``."""
        merged = _merge_ancestors(mapping, origin)
        del merged["specs"]
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise SquamataError(f"{origin}: {first_problem(error, _hint)}") from None

    def with_calibration(self, **settings: int | None) -> Recipe:
        """The same with other calibration settings, those that are not None; SquamataError if one is out of range."""
        given = {key: value for key, value in settings.items() if value is not None}
        try:
            changed = Calibration.model_validate(self.calibration.model_dump() | given)
        except ValidationError as error:
            raise SquamataError(f"calibration: {first_problem(error, _hint)}") from None
        return self.model_copy(update={"calibration": changed})

    def with_tables(self, embedding: str | None = None, head: str | None = None) -> Recipe:
        """The same with another format (``TABLE_FORMATS``) for the embedding or the head; None: as it is."""
        rules = []
        for table, wanted in (("embedding", embedding), ("head", head)):
            if wanted is not None and wanted not in TABLE_FORMATS:
                raise SquamataError(f"no {table} format '{wanted}'{nearest(wanted, TABLE_FORMATS)}")
            for site, spec in TABLE_FORMATS[wanted].items() if wanted else ():
                if site.startswith(table):
                    rules.append(Rule.model_validate({"site": site, "spec": spec}))
        return self.model_copy(update={"rules": (*self.rules, *rules)})

    def to_mapping(self) -> dict[str, Any]:
        """The resolved recipe as plain data: what a checkpoint stores."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"name": self.name}

    @property
    def stochastic(self) -> bool:
        """True if something is rounded by noise, which every kernel draws for itself: no two give the same codes."""
        return any(rule.spec is not None and rule.spec.rounding == "stochastic" for rule in self.rules)

    def check_architectures(self, blocks: tuple[str, ...]) -> None:
        """Refuse a model with a layer of a kind that the recipe is not for."""
        for kind in sorted(set(blocks) - set(self.architectures)):
            raise SquamataError(f"recipe {self.name} is for {', '.join(self.architectures)}, not {kind}")

    def resolve(self, blocks: tuple[str, ...]) -> dict[str, QuantSpec]:
        """Site name -> spec for a model whose layers are of these kinds; sites left in float are absent.

        Raises SquamataError if a spec cannot run where it is put (see ``refuse_illegal``).
        """
        chosen: dict[str, QuantSpec] = {}
        infos = all_sites(blocks)
        for site, info in infos.items():
            matching = [rule for rule in self.rules if rule.matches(site, info, blocks)]
            if matching and matching[-1].spec is not None:
                chosen[site] = matching[-1].spec
        for site, spec in chosen.items():
            refuse_illegal(site, spec, infos[site].in_company(site, chosen))
        refuse_unlike_groups(chosen, infos)
        everywhere = [item for kind in BLOCKS for item in all_sites((kind,) * len(blocks)).items()]
        for rule in self.rules:
            if not any(rule.names(site, info) for site, info in everywhere):
                raise SquamataError(f"recipe {self.name}: no site matches {rule.wanted(dict(everywhere))}")
            if beyond := [layer for layer in rule.layers or () if not -len(blocks) <= layer < len(blocks)]:
                problem = f"the rule for '{rule.site}' speaks of layer {beyond[0]}"
                raise SquamataError(f"recipe {self.name}: {problem}, the model has layers 0 to {len(blocks) - 1}")
        return chosen

    def static_sites(self, blocks: tuple[str, ...]) -> dict[str, QuantSpec]:
        """Those of ``resolve`` that need calibration: activations and states whose scale is known before the run."""
        infos = all_sites(blocks)
        chosen = self.resolve(blocks).items()
        return {site: spec for site, spec in chosen if infos[site].kind in ("activation", "state") and not spec.dynamic}


def refuse_illegal(site: str, spec: QuantSpec, info: SiteInfo) -> None:
    """The one rule that decides which recipes can run.

    A product sums over one axis: a scale may vary along every axis that survives it, and in groups that accumulate
    separately (see ``groups``), never along the summed one. Where a tensor is dequantized first anything is legal.
    """
    axes = set(spec.granularity.axes) - {"token"}
    if info.summed and (axes or (spec.granularity.group and not spec.dynamic)):
        raise SquamataError(
            f"{site}: a scale per {spec.granularity} cannot run: the product that reads it sums over "
            f"{' and '.join(info.summed)}; use 'tensor' or 'token', or at run time 'token,group(N)' as in the weight"
        )
    if spec.tabulated and not info.reads.startswith("mixer."):
        raise SquamataError(f"{site}: codec 'table' is for the weights of the layers' products; use 'uniform'")
    if info.summed or info.kind == "weight":
        _refuse_in_product(site, spec, info)
    if info.kind == "parameter" and spec.carrier != "int8":
        raise SquamataError(
            f"{site}: {spec.form} cannot be stored: parameters are int8; use a format of 8 bits at most"
        )
    if info.kind != "activation" and spec.codec in FORMATS and FORMATS[spec.codec].live:
        raise SquamataError(
            f"{site}: codec '{spec.codec}' takes a number from every token, which only activations have"
        )
    if spec.rounding == "stochastic" and info.kind != "state":
        raise SquamataError(f"{site}: 'rounding: stochastic' is for states, which are rounded again at every token")
    if spec.absolute and site.rpartition(".")[2] not in DECAYS:
        raise SquamataError(f"{site}: codec '{spec.codec}' has no sign and ends at 1: it is for {' and '.join(DECAYS)}")
    if info.kind == "state" and "token" in spec.granularity.axes:
        raise SquamataError(f"{site}: a state has no axis 'token'; 'dynamic: true' alone gives each sequence its scale")
    if spec.granularity.group and axes & {"segment", "index"}:
        raise SquamataError(f"{site}: '{spec.granularity}' cannot run: a group(N) lies within one row; leave one out")
    if spec.second_level and not info.reads:
        raise SquamataError(f"{site}: a second level of scales is for the weight of a product; remove 'second_level'")
    if info.kind == "weight" and "in" in axes:
        raise SquamataError(f"{site}: a scale along 'in' cannot run: the product sums over it; use group(N)")
    refuse_to_keep(site, spec, info)
    if "token" in spec.granularity.axes and not spec.dynamic:
        raise SquamataError(f"{site}: a scale per token is known only at run time; add 'dynamic: true'")
    if spec.dynamic and (spec.granularity.ragged or (spec.granularity.group and not info.summed)):
        raise SquamataError(f"{site}: dynamic scales vary along whole axes, not per {spec.granularity}")
    if spec.dynamic and info.kind in ("weight", "parameter"):
        raise SquamataError(f"{site}: weights do not change at run time; remove 'dynamic: true'")
    if spec.dynamic and info.kind == "activation" and "token" not in spec.granularity.axes:
        raise SquamataError(
            f"{site}: one run-time scale over all tokens would let later tokens, padding and other sequences change "
            f"earlier ones; add 'token' to the granularity"
        )
    if info.kind in ("weight", "parameter") and spec.granularity.ragged:
        raise SquamataError(f"{site}: an index is for activations and states; use channel, segment or group(N)")
    if spec.granularity.ragged and not info.mapped:
        raise SquamataError(
            f"{site}: has no index map: 'reorder' leaves those of a Mamba-2's x, u, y and state; use tensor"
        )
    if unknown := axes - _axis_words(info):
        raise SquamataError(f"{site}: has no axis '{sorted(unknown)[0]}' (its axes: {', '.join(info.axes)})")


def _refuse_in_product(site: str, spec: QuantSpec, info: SiteInfo) -> None:
    """What only holds where codes meet codes: one step size, of int8. A table's weight is dequantized first."""
    if spec.tabulated:
        return
    instead = f", or give the product a site of its own: a rule for '{info.apart}'" if info.apart else ""
    if spec.codec != "uniform":
        problem = f"codec '{spec.codec}' cannot run: a product needs one step size"
        raise SquamataError(f"{site}: {problem}; use 'uniform'{instead}")
    if spec.bits > 8:
        raise SquamataError(f"{site}: {spec.bits} bits cannot run: a product takes 8 at most; use fewer{instead}")


def _axis_words(info: SiteInfo) -> set[str]:
    """Words of a granularity that mean something here; ``channel`` stands for every axis but state and tap."""
    words = set(info.axes) | ({"segment"} if info.kind in ("weight", "parameter") else {"index"})
    return words | ({"channel"} if words - {"state", "tap", "segment", "index"} else set())


def recipe_folder() -> Path:
    """Folder of the recipes that come with the package."""
    return Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def _read_yaml(name_or_path: str | Path) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix not in SUFFIXES:
        if str(name_or_path) not in recipe_names():
            known = nearest(str(name_or_path), recipe_names())
            raise SquamataError(f"no recipe named '{name_or_path}'{known}; a file of your own ends in .yaml")
        path = recipe_folder() / f"{name_or_path}.yaml"
    return _checked(read_yaml(path, "recipe"), str(path))


def _checked(mapping: Any, origin: str) -> dict[str, Any]:
    """A copy that may be changed, with ``rules`` and ``specs``; refuses what is not even shaped like a recipe."""
    if not isinstance(mapping, dict):
        raise SquamataError(f"{origin}: a recipe is a YAML mapping with name and rules")
    for key, kind, what in (("rules", list, "a list"), ("specs", dict, "a mapping"), ("extends", str, "a name")):
        if not isinstance(mapping.get(key) or kind(), kind):
            raise SquamataError(f"{origin}: '{key}' must be {what}")
    rules = [dict(rule) if isinstance(rule, dict) else rule for rule in mapping.get("rules") or []]
    return mapping | {"rules": rules, "specs": mapping.get("specs") or {}}


def _merge_ancestors(mapping: dict[str, Any], origin: str, seen: Iterable[str] = ()) -> dict[str, Any]:
    """One mapping without ``extends``, its rules' named specs resolved; ``specs`` are those of all generations."""
    mapping = _checked(mapping, origin)
    parent_name = mapping.pop("extends", None)
    if parent_name is None:
        return _resolve_specs(mapping, {}, origin)
    if parent_name.endswith((".yaml", ".yml")):
        parent_name = str((Path(origin).parent / parent_name).resolve())
    if parent_name in seen:
        raise SquamataError(f"{origin}: 'extends' goes round in a circle at '{parent_name}'")
    parent = _merge_ancestors(_read_yaml(parent_name), parent_name, (*seen, parent_name))
    own = _resolve_specs(mapping, parent["specs"], origin)
    inherited = {key: value for key, value in parent.items() if key not in ("name", "description")}
    merged = inherited | own | {"rules": parent["rules"] + own["rules"]}
    calibrations = [part["calibration"] for part in (parent, own) if isinstance(part.get("calibration"), dict)]
    if len(calibrations) == 2:
        merged["calibration"] = calibrations[0] | calibrations[1]
    return merged


def _resolve_specs(mapping: dict[str, Any], inherited: dict[str, Any], origin: str) -> dict[str, Any]:
    """The mapping with every spec that a rule names in the name's place, and ``specs`` joined with the inherited."""
    for name, spec in mapping["specs"].items():
        if name == "float":
            raise SquamataError(f"{origin}: a spec cannot be named 'float', which means: not quantized")
        try:
            QuantSpec.model_validate(spec)
        except ValidationError as error:
            raise SquamataError(f"{origin}: {first_problem(error, _hint, ('specs', name))}") from None
    specs = inherited | mapping["specs"]
    for number, rule in enumerate(mapping["rules"]):
        if isinstance(rule, dict) and isinstance(rule.get("spec"), str) and rule["spec"] != "float":
            if rule["spec"] not in specs:
                raise SquamataError(f"{origin}: no spec named '{rule['spec']}'{nearest(rule['spec'], specs)}")
            rule["spec"] = specs[rule["spec"]]
        try:
            Rule.model_validate(rule)
        except ValidationError as error:  # now, while the number is the one in this file
            raise SquamataError(f"{origin}: {first_problem(error, _hint, ('rules', number))}") from None
    return mapping | {"specs": specs}


def _hint(place: Place) -> str:
    """What may have been meant by an unknown key at this place of a recipe."""
    owners: dict[str, type[Data]] = {"rules": Rule, "calibration": Calibration, "specs": QuantSpec}
    owner: type[Data] = Recipe if len(place) == 1 else owners.get(str(place[0]), Named)
    if place[-2:-1] == ("scale",):
        owner = ScaleSpec
    elif "spec" in place[:-1]:
        owner = QuantSpec
    if len(place) > 1 and place[-1] in Recipe.model_fields and place[-1] not in owner.model_fields:
        return ": a key of the recipe itself"
    likely = nearest(str(place[-1]), owner.model_fields)
    if owner in (ScaleSpec, Named) and "did you mean" not in likely:
        return f": a parameter belongs to its name, {{NAME: {{{place[-1]}: VALUE}}}}"
    return likely
