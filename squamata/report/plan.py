"""A study as data: a YAML grid, and the rows it asks for.

YAML form::

    name: alpha-sweep
    description: one line
    models: [bundled, mamba2-24m]          # folders (see --models), hub names, 'bundled'; or {label: path}
    recipes: [float, quamba-w8a8]          # names, or YAML files beside the study
    overrides:                             # every recipe as it is, if there are none
      - {name: as it is}
      - name: u 0.999
        changes: [{site: "*.mixer.u", set: {scale: {percentile: {alpha: 0.999}}}}]
      - name: float state
        rules: [{site: "*.mixer.state", spec: float}]
        recipes: [quamba-w8a8]             # only these
    seeds: [0]
    calibration: pile.jsonl                # or 'bundled'; samples and length: the recipe's unless given
    text: wikitext2-test.txt               # or 'bundled', or {label: path}
    max_tokens: 16384
    window: 512
    modes: [parallel, recurrent]           # or which texts in which: {parallel: [a, b], recurrent: [a]}
    tasks: [lambada_openai, arc_easy]      # accuracy: files NAME.jsonl beside the texts (see --data)
    task_limit: 1000                       # the first so many examples of each
    distributions: ["layers.0.mixer.u"]    # histograms of what lands there
    baseline: {recipe: quamba-w8a8}        # what the others are compared with; else the first row of a model
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from squamata.errors import SquamataError, about, nearest
from squamata.evaluate.tasks import TASKS
from squamata.load.hub import bundled, resolve
from squamata.load.source import open_source
from squamata.models.config import ModelConfig
from squamata.report.accuracy import LAMBADA, read_task
from squamata.report.rules import Change, changed_specs, rules_for
from squamata.report.verbs import Verbs
from squamata.spec.quant import Data
from squamata.spec.recipe import Calibration, Recipe
from squamata.spec.yaml_file import Place, first_problem, read_yaml

ModeName = Literal["parallel", "recurrent"]

AS_IT_IS = "as it is"  # the override that changes nothing
BUNDLED = {"calibration": "calibration.jsonl", "text": "excerpt.jsonl"}


class Override(Data):
    """A named variation of every recipe: ``changes`` of its specs, then further ``rules``; the other fields replace
    the recipe's. ``calibration_text``: another file than the study's."""

    name: str
    changes: tuple[Change, ...] = ()
    rules: tuple[dict[str, Any], ...] = ()
    transforms: tuple[Any, ...] | None = None
    weights: Any = None
    correct: Any = None
    calibration: dict[str, Any] = Field(default_factory=dict)
    calibration_text: str | None = None
    recipes: tuple[str, ...] | None = None

    @property
    def changes_otherwise(self) -> bool:
        """True if a recipe is changed by more than ``changes``."""
        replaced = (self.transforms, self.weights, self.correct)
        return bool(self.rules or self.calibration or any(field is not None for field in replaced))


class Baseline(Data):
    """The rows that others of the same model and seed are compared with."""

    recipe: str
    override: str | None = None


class Study(Data):
    """A grid; see the module's docstring."""

    name: str
    description: str = ""
    models: Annotated[dict[str, str], Field(min_length=1)]
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    overrides: Annotated[tuple[Override, ...], Field(min_length=1)] = (Override(name=AS_IT_IS),)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    calibration: str | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    text: Annotated[dict[str, str], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    window: Annotated[int, Field(ge=1)] = 2048
    modes: Annotated[tuple[ModeName, ...] | dict[ModeName, tuple[str, ...]], Field(min_length=1)] = ("parallel",)
    tasks: tuple[str, ...] = ()
    task_limit: Annotated[int, Field(ge=1)] | None = None
    distributions: tuple[str, ...] = ()
    baseline: Baseline | None = None

    @field_validator("models", "text", mode="before")
    @classmethod
    def _labelled(cls, value: Any) -> Any:
        """``path`` or ``[path, ...]`` -> ``{label: path}``, the label being the last part of the path."""
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list | tuple):
            labels = [Path(str(entry)).name for entry in value]
            if len(set(labels)) < len(labels):
                raise ValueError(f"two entries are called the same; write them as a mapping {{label: path}}: {value}")
            return dict(zip(labels, value, strict=True))
        return value

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a YAML file; SquamataError, one line, for an unknown key (with the nearest) or a bad value."""
        mapping = read_yaml(path, "study")
        if not isinstance(mapping, dict):
            raise SquamataError(f"{path}: a study is a YAML mapping with name, models, recipes and text")
        try:
            study = cls.model_validate(mapping)
        except ValidationError as error:
            raise SquamataError(f"{path}: {first_problem(error, _hint)}") from None
        study._refuse_unknown_recipes(str(path))
        study._refuse_unknown_texts(str(path))
        for task in study.tasks:
            if task not in (LAMBADA, *TASKS):
                raise SquamataError(f"{path}: no task '{task}'{nearest(task, (LAMBADA, *TASKS))}")
        return study

    def _refuse_unknown_texts(self, origin: str) -> None:
        named = self.modes.values() if isinstance(self.modes, dict) else ()
        for label in (label for labels in named for label in labels):
            if label not in self.text:
                raise SquamataError(f"{origin}: modes: '{label}' is no text of this study{nearest(label, self.text)}")
        if isinstance(self.modes, dict) and not any(named):
            raise SquamataError(f"{origin}: modes: name the texts to judge on, as in {{parallel: [a, b]}}")

    def _refuse_unknown_recipes(self, origin: str) -> None:
        named = [name for override in self.overrides for name in override.recipes or ()]
        for name in [*named, *([self.baseline.recipe] if self.baseline else [])]:
            if name not in self.recipes:
                raise SquamataError(f"{origin}: '{name}' is no recipe of this study{nearest(name, self.recipes)}")
        overrides = [override.name for override in self.overrides]
        if self.baseline and self.baseline.override not in (None, *overrides):
            wrong = self.baseline.override
            raise SquamataError(f"{origin}: '{wrong}' is no override of this study{nearest(str(wrong), overrides)}")
        if len(set(overrides)) < len(overrides):
            raise SquamataError(f"{origin}: two overrides have the same name")


def _hint(place: Place) -> str:
    """What may have been meant by an unknown key at this place of a study."""
    owners: dict[str | int, type[Data]] = {"overrides": Override, "changes": Change, "baseline": Baseline}
    owner = next((owners[part] for part in reversed(place[:-1]) if part in owners), Study)
    return nearest(str(place[-1]), owner.model_fields)


@dataclass(frozen=True)
class Places:
    """Where a study's relative paths start: ``models`` for models, ``data`` for texts, ``study`` for recipe files."""

    study: Path
    models: Path | None = None
    data: Path | None = None

    def model(self, path: str) -> str:
        inside = None if self.models is None else self.models / path
        return path if inside is None or not inside.exists() else str(inside)

    def text(self, path: str, role: str) -> str:
        if path == "bundled":
            return str(bundled() / BUNDLED[role])
        found = self.data / path if self.data is not None else Path(path)
        if not found.is_file():
            raise SquamataError(f"no such file: {found} (--data FOLDER says where a study's texts are)")
        return str(found)


@dataclass(frozen=True)
class RowPlan:
    """One row to be measured. ``labels``: model, recipe, override. ``description``: all that decides its numbers,
    free of paths; ``id``: its hash. ``texts`` and ``tasks``: their files. ``asked``: the overrides of the grid that it
    is the row of, by recipe and override (two of the same numbers are measured once)."""

    id: str
    labels: dict[str, str]
    seed: int
    model: str
    recipe: Recipe
    calibration: str | None
    texts: dict[str, str]
    description: dict[str, Any]
    tasks: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.labels['model']}, {self.labels['recipe']}, {self.labels['override']}, seed {self.seed}"


def plan_rows(study: Study, places: Places, verbs: Verbs) -> tuple[list[RowPlan], list[str]]:
    """The rows of a study in grid order, and notes on those left out.

    Left out: a recipe that is not for a model's architecture, an override that is not for a recipe, and a row whose
    numbers must be those of an earlier one because its override changes nothing. Everything else that cannot run is a
    SquamataError now, before any work is done.
    """
    planner = _Planner(study, places, verbs)
    for label, path in study.models.items():
        planner.add_model(label, places.model(path))
    return planner.rows, planner.notes


class _Planner:
    """Collects ``rows`` and ``notes``."""

    def __init__(self, study: Study, places: Places, verbs: Verbs) -> None:
        self.study, self.places, self.verbs = study, places, verbs
        self.texts = {label: places.text(path, "text") for label, path in study.text.items()}
        self.tasks = {name: places.text(f"{name}.jsonl", "text") for name in study.tasks}
        for name, path in self.tasks.items():
            read_task(name, path, study.task_limit)
        modes = study.modes
        self.modes = {mode: list(texts) for mode, texts in modes.items()} if isinstance(modes, dict) else list(modes)
        self.prints = _Fingerprints()
        self.rows: list[RowPlan] = []
        self.notes: list[str] = []

    def add_model(self, label: str, source: str) -> None:
        try:
            config = open_source(source).config
        except SquamataError as error:
            lost = source != "bundled" and not Path(source).exists()
            hint = "; --models FOLDER says where a study's models are" if lost else ""
            raise SquamataError(f"{error}{hint}") from None
        seen: dict[str, RowPlan] = {}
        for name in self.study.recipes:
            recipe = _read_recipe(name, self.places.study)
            if not set(config.blocks) <= set(recipe.architectures):
                self.notes.append(f"{label}, {name}: left out, the recipe is for {', '.join(recipe.architectures)}")
                continue
            for override in self.study.overrides:
                if override.recipes is None or name in override.recipes:
                    for row in self._rows(label, source, config, (name, recipe), override):
                        self._keep(row, (name, override.name), config, seen)

    def _keep(self, row: RowPlan, asked: tuple[str, str], config: ModelConfig, seen: dict[str, RowPlan]) -> None:
        meaning = _digest(row.description | {"labels": None, "recipe": _meaning(row.recipe, config)})
        kept = seen.setdefault(meaning, row)
        kept.asked.append(asked)
        if kept is row:
            self.rows.append(row)
        else:
            words = ", ".join((row.labels["model"], *asked))
            self.notes.append(f"{words}, seed {row.seed}: left out, it equals {kept.name}")

    def _rows(
        self, label: str, source: str, config: ModelConfig, named: tuple[str, Recipe], override: Override
    ) -> Iterator[RowPlan]:
        """One a seed; an override that speaks of nothing in the recipe leaves it, and is called, as it is."""
        name, recipe = named
        with about(f"{label}, {name}, {override.name}"):
            varied = vary(recipe, name, override, config, self.places.study)
            self.verbs.check(varied, config)
            drawn_from = override.calibration_text or self.study.calibration
            calibration = None if drawn_from is None else self.places.text(drawn_from, "calibration")
        same = varied is recipe and override.calibration_text is None
        labels = {"model": label, "recipe": name, "override": AS_IT_IS if same else override.name}
        if calibration is None and source == "bundled":
            calibration = str(bundled() / BUNDLED["calibration"])
        varied = varied.with_calibration(samples=self.study.samples, length=self.study.length)
        for seed in self.study.seeds:
            description = {"labels": labels, "seed": seed, "model_sha256": self.prints.model(source)}
            description |= self._conditions(varied, calibration)
            judged_by = (self.texts, description, self.tasks)
            yield RowPlan(_digest(description), labels, seed, source, varied, calibration, *judged_by)

    def _conditions(self, recipe: Recipe, calibration: str | None) -> dict[str, Any]:
        """What decides a row's numbers, model and seed apart, without any path."""
        study = self.study
        tasks = {name: self.prints.file(Path(path)) for name, path in self.tasks.items()}
        return ({"tasks": tasks, "task_limit": study.task_limit} if tasks else {}) | {
            "recipe": {key: value for key, value in recipe.to_mapping().items() if key not in ("name", "description")},
            "calibration": recipe.calibration.model_dump(),
            "calibration_sha256": None if calibration is None else self.prints.file(Path(calibration)),
            "text_sha256": {label: self.prints.file(Path(path)) for label, path in self.texts.items()},
            "max_tokens": study.max_tokens,
            "window": study.window,
            "modes": self.modes,
            "distributions": list(study.distributions),
        }


def _read_recipe(name: str, study: Path) -> Recipe:
    is_file = name.endswith((".yaml", ".yml"))
    return Recipe.read(study.parent / name if is_file else name)


def _meaning(recipe: Recipe, config: ModelConfig) -> dict[str, Any]:
    """What a recipe does to this model, whatever rules say so."""
    specs = {site: spec.model_dump(mode="json") for site, spec in recipe.resolve(config.blocks).items()}
    said = {"transforms", "weights", "tune"} | ({"correct"} if recipe.correct else set())
    return recipe.model_dump(mode="json", include=said) | {"specs": specs}


def vary(recipe: Recipe, reference: str, override: Override, config: ModelConfig, origin: Path) -> Recipe:
    """The recipe as an override has it, itself if nothing in it is changed; ``reference``: its name, or its file
    beside ``origin``."""
    changed = changed_specs(recipe.resolve(config.blocks), override.changes, config.blocks)
    if not changed and not override.changes_otherwise:
        return recipe
    mapping: dict[str, Any] = {
        "name": f"{recipe.name}, {override.name}",
        "description": f"{recipe.description} Changed: {override.name}.",
        "extends": reference,
        "rules": [*rules_for(changed, config.n_layers), *override.rules],
    }
    if override.calibration:
        mapping["calibration"] = _calibration(recipe, override.calibration)
    mapping |= {} if override.transforms is None else {"transforms": list(override.transforms)}
    mapping |= {} if override.weights is None else {"weights": override.weights}
    mapping |= {} if override.correct is None else {"correct": override.correct}
    return Recipe.from_mapping(mapping, origin=str(origin))


def _calibration(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in Calibration.model_fields:
            raise SquamataError(f"calibration: unknown key '{key}'{nearest(key, Calibration.model_fields)}")
    return recipe.calibration.model_dump() | dict(given)


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


class _Fingerprints:
    """SHA-256 of files, and of a model's configuration and weights together, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def file(self, path: Path) -> str:
        if path not in self._known:
            with path.open("rb") as file:
                self._known[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._known[path]

    def model(self, path: str) -> str:
        folder = resolve(path)
        files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")])
        parts = [f"{file.name} {self.file(file)}" for file in files if file.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
