"""One model in several forms (float, quantized by this recipe, by that one), and any mixture of them, site by site.

Every form is calibrated and quantized once. A mixture picks tensors and scales; nothing is quantized again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from squamata.errors import SquamataError
from squamata.evaluate.size import tensor_bytes
from squamata.kernels.qtensor import Value
from squamata.models.checkpoint import Checkpoint
from squamata.report.reference import parameter_count
from squamata.report.rules import rules_for
from squamata.report.verbs import Verbs
from squamata.run.model import Model
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

FLOAT = "float"


@dataclass(frozen=True)
class CalibrationChoice:
    """What ``quantize`` is told of calibration: a text (None where no recipe needs one), its draw, the recipe's
    numbers unless given; ``device``: where it is computed."""

    text: Path | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Form:
    """The model by one recipe: specs of its quantized sites, everything it is made of, stored bytes by site."""

    recipe: Recipe
    specs: Mapping[str, QuantSpec]
    checkpoint: Checkpoint
    bytes: Mapping[str, int]


class Forms:
    """Forms by name, ``float`` among them: the model after the transforms of the first recipe, with nothing rounded.

    All forms share those transforms, and the first recipe's weight quantizer and calibration settings; of the other
    recipes only the rules count.
    """

    def __init__(self, model: str, recipes: Mapping[str, Recipe], calibration: CalibrationChoice, verbs: Verbs) -> None:
        first = next(iter(recipes.values()))
        wanted = {name: first.model_copy(update={"rules": recipe.rules}) for name, recipe in recipes.items()}
        wanted = {FLOAT: first.model_copy(update={"rules": ()})} | wanted
        with tempfile.TemporaryDirectory() as folder:
            made = {
                name: _make(model, recipe, calibration, verbs, Path(folder) / name) for name, recipe in wanted.items()
            }
        self._forms = {name: form for name, (form, _) in made.items()}
        self.parameters = parameter_count(model)
        self._tokenizer = made[FLOAT][1].tokenizer
        self.tied = all(form.checkpoint.config.tie_embeddings for form in self._forms.values())
        self.config = self[FLOAT].checkpoint.config.model_copy(update={"tie_embeddings": self.tied})

    def __getitem__(self, name: str) -> Form:
        return self._forms[name]

    def has(self, name: str) -> bool:
        return name in self._forms

    def assemble(self, choice: Mapping[str, str]) -> Model:
        """The model whose sites have the forms of ``choice``, all others being float; mode integer."""
        if self.tied and "embedding.weight" in choice:
            choice = dict(choice) | {"head.weight": choice["embedding.weight"]}
        specs = {site: self[form].specs.get(site) for site, form in choice.items()}
        tensors = {name: self._tensor(name, choice.get(name, FLOAT)) for name in self._names()}
        site_tensors: dict[str, Tensor] = {}
        for site, form in choice.items():
            site_tensors |= _of_site(site, self[form].checkpoint.site_tensors)
        recipe = self.recipe(specs)
        checkpoint = Checkpoint(self.config, tensors, recipe, site_tensors)
        return Model(checkpoint, tokenizer=self._tokenizer)

    def recipe(self, specs: Mapping[str, QuantSpec | None], name: str = "mixture") -> Recipe:
        """A recipe of these specs and nothing else, with the transforms that all forms share."""
        rules = rules_for({site: spec for site, spec in specs.items() if spec is not None}, self.config.n_layers)
        return Recipe.from_mapping(self[FLOAT].recipe.to_mapping() | {"name": name, "description": "", "rules": rules})

    def bytes(self, choice: Mapping[str, str]) -> int:
        """Stored bytes of the mixture: tensors with their scales, and the scales of activations and states."""
        sites = dict.fromkeys((*self._names(), *choice))
        return sum(self._bytes(site, choice.get(site, FLOAT)) for site in sites)

    def _bytes(self, site: str, form: str) -> int:
        stored = self[form].bytes
        if site == "head.weight":
            return 0 if self.tied else stored.get(site, stored["embedding.weight"])
        return stored.get(site, 0)

    def _names(self) -> list[str]:
        names = list(self[FLOAT].checkpoint.tensors)
        return names if self.tied or "head.weight" in names else [*names, "head.weight"]

    def _tensor(self, name: str, form: str) -> Value:
        tensors = self[form].checkpoint.tensors
        return tensors["embedding.weight"] if name == "head.weight" and name not in tensors else tensors[name]


def _make(model: str, recipe: Recipe, calibration: CalibrationChoice, verbs: Verbs, out: Path) -> tuple[Form, Model]:
    drawn = (calibration.text, calibration.samples, calibration.length, calibration.seed)
    verbs.quantize(model, recipe, out, *drawn, device=calibration.device, recoverable=False)
    loaded = verbs.load(out)
    stored = dict(tensor_bytes(loaded))
    for name, tensor in loaded.checkpoint.site_tensors.items():
        site = name.rpartition(".")[0]
        stored[site] = stored.get(site, 0) + tensor.nbytes
    return Form(recipe, loaded.specs, loaded.checkpoint, stored), loaded


def _of_site(site: str, site_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in site_tensors.items() if name.rpartition(".")[0] == site}


def units_of(specs: Iterable[str], per: str, tied: bool) -> dict[str, tuple[str, ...]]:
    """Name -> sites of what is toggled together. ``per``: ``site`` (``mixer.u`` of all layers), ``layer``
    (``layers.3``), or ``cell`` (every site by itself). A tied head goes with the embedding."""
    if per not in ("site", "layer", "cell"):
        raise SquamataError(f"per '{per}': use site, layer or cell")
    units: dict[str, list[str]] = {}
    for site in specs:
        if site == "head.weight" and tied:
            continue
        parts = site.split(".", 2)
        inside = parts[0] == "layers"
        name = site if not inside or per == "cell" else (parts[2] if per == "site" else ".".join(parts[:2]))
        units.setdefault(name, []).append(site)
    return {name: tuple(sites) for name, sites in units.items()}


def sites_at(units: Mapping[str, tuple[str, ...]], form: str) -> dict[str, str]:
    """The choice that gives every site of these units one form."""
    return {site: form for sites in units.values() for site in sites}
