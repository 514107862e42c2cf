"""Mixed precision under a budget: which units get the better of two recipes, chosen greedily and by evolution."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import Evaluation, difference_of_sums
from squamata.evaluate.result import Result
from squamata.evaluate.uncertainty import Interval
from squamata.models.config import ModelConfig
from squamata.report.forms import FLOAT, Forms, units_of
from squamata.report.rules import rules_for
from squamata.report.sensitivity import Judge, Progress, Sensitivity, measure_units
from squamata.spec.recipe import Recipe

GENERATIONS = 5  # Quamba2 (arXiv 2503.22879), appendix: population 40, top half kept, 10 mutations, 10 crossovers

Units = Mapping[str, tuple[str, ...]]
Choice = frozenset[str]  # units that have the better form


@dataclass(frozen=True)
class Price:
    """What a mixture costs if not bytes: ``of`` its configuration and recipe, in ``unit`` (``ms a token``)."""

    unit: str
    of: Callable[[ModelConfig, Recipe], float]


@dataclass(frozen=True)
class Mixture(Result):
    """One way to spend the budget. ``upgraded``: units in the better form; ``evaluations``: model runs it took to
    find; ``price``: in the budget's unit; figures of the whole model on the judge's text."""

    name: str
    upgraded: list[str]
    bytes: int
    bits_per_parameter: float
    price: float
    evaluations: int
    kl: float
    kl_ci: Interval | None
    perplexity: float
    perplexity_ci: Interval | None


@dataclass(frozen=True)
class Search(Result):
    """``mixtures``: nothing upgraded, greedy, evolution, everything upgraded. ``verdict``: evolution beside greedy, by
    KL. ``best``: the name of the one within the budget that has the lower KL."""

    budget: float
    unit: str
    mixtures: list[Mixture]
    verdict: str
    best: str

    def mixture(self, name: str) -> Mixture:
        return next(mixture for mixture in self.mixtures if mixture.name == name)


class Mixer:
    """Two forms of a model, and what a choice between them costs and gives. ``units``: those in which they differ.

    ``base``: what nothing upgraded costs, in bytes unless there is another ``price``; ``cost``: what each unit adds to
    that by itself. Bytes and DRAM traffic add up; energy of products may be less together, as a product in floating
    point is paid for once, whichever operand asks for it: so a budget is kept in any case.
    """

    def __init__(self, forms: Forms, low: str, high: str, per: str, price: Price | None = None) -> None:
        self.forms, self.low, self.high, self._price = forms, low, high, price
        self._sites = list(dict.fromkeys((*forms[low].specs, *forms[high].specs)))
        units = units_of(self._sites, per, forms.tied)
        self.units: Units = {unit: some for unit, some in units.items() if any(map(self._differs, some))}
        self.unit = price.unit if price else "bytes"
        self.base = self.price(frozenset())
        self.cost = {unit: self.price(frozenset((unit,))) - self.base for unit in self.units}

    def _differs(self, site: str) -> bool:
        return self.forms[self.low].specs.get(site) != self.forms[self.high].specs.get(site)

    def sites(self, upgraded: Choice) -> dict[str, str]:
        """Site -> form."""
        better = {site for unit in upgraded for site in self.units[unit]}
        return {site: self.high if site in better else self.low for site in self._sites}

    def bytes(self, upgraded: Choice) -> int:
        return self.forms.bytes(self.sites(upgraded))

    def price(self, upgraded: Choice) -> float:
        """What the budget is spent on."""
        if self._price is None:
            return self.bytes(upgraded)
        return self._price.of(self.forms.config, self.recipe(upgraded, "mixture"))

    def recipe(self, upgraded: Choice, name: str) -> Recipe:
        """The first form's recipe, and rules with layer lists that give the upgraded units the second's specs."""
        low, high = self.forms[self.low], self.forms[self.high]
        specs = {site: high.specs.get(site) for unit in upgraded for site in self.units[unit]}
        if self.forms.tied and "embedding.weight" in specs:
            specs["head.weight"] = specs["embedding.weight"]
        changed = {site: spec for site, spec in sorted(specs.items()) if spec != low.specs.get(site)}
        mapping = low.recipe.to_mapping()
        rules = [*mapping.get("rules", []), *rules_for(changed, self.forms.config.n_layers)]
        description = f"{low.recipe.name}, with {', '.join(sorted(upgraded)) or 'nothing'} in better form."
        return Recipe.from_mapping(mapping | {"name": name, "description": description, "rules": rules})


def greedy(cost: Mapping[str, float], gain: Mapping[str, float], budget: float) -> Choice:
    """Units in the order of their gain for what they cost, each taken if it still fits into ``budget``.

    Units that cost nothing come first; those that gain nothing are never taken.
    """
    spent, taken = 0.0, []
    worth = [unit for unit in cost if gain[unit] > 0]
    for unit in sorted(worth, key=lambda unit: -gain[unit] / max(cost[unit], 1e-9)):
        if spent + cost[unit] <= budget:
            taken.append(unit)
            spent += cost[unit]
    return frozenset(taken)


def evolve(
    cost: Mapping[str, float], loss: Callable[[Choice], float], budget: float, evaluations: int, seed: int = 0
) -> Choice:
    """The best choice that an evolutionary search finds with at most ``evaluations`` calls of ``loss``.

    As in Quamba2's W4AX: the better half of a population lives on and is joined by as many children, half mutations,
    half crossovers; five generations. The population is as large as the evaluations allow (40 would need 140 of them).
    """
    draw = random.Random(seed)
    population = max(4, int(evaluations / (1 + GENERATIONS / 2)))
    known: dict[Choice, float] = {}

    def admit(choice: Choice) -> None:
        fitting = _fit(choice, cost, budget, draw)
        if fitting not in known and len(known) < evaluations:
            known[fitting] = loss(fitting)

    for _ in range(population):
        admit(frozenset())
    while len(known) < evaluations:
        best = sorted(known, key=lambda choice: known[choice])[: population // 2]
        before = len(known)
        for number in range(2 * population):  # twice as many: children that are known already cost nothing
            if len(known) - before >= population // 2:
                break
            parent, other = draw.choice(best), draw.choice(best)
            admit(_mutated(parent, cost, draw) if number % 2 else _crossed(parent, other, draw))
        if len(known) == before:  # nothing new within reach
            break
    return min(known, key=lambda choice: known[choice])


def _fit(choice: Choice, cost: Mapping[str, float], budget: float, draw: random.Random) -> Choice:
    """Units dropped at random until the choice fits, then units added at random while they fit."""
    kept = sorted(choice)
    draw.shuffle(kept)
    while kept and sum(cost[unit] for unit in kept) > budget:
        kept.pop()
    rest = sorted(set(cost) - set(kept))
    draw.shuffle(rest)
    spent = sum(cost[unit] for unit in kept)
    for unit in rest:
        if spent + cost[unit] <= budget:
            kept.append(unit)
            spent += cost[unit]
    return frozenset(kept)


def _mutated(choice: Choice, cost: Mapping[str, float], draw: random.Random) -> Choice:
    """One unit out, a unit that was not there in."""
    inside, outside = sorted(choice), sorted(set(cost) - choice)
    changed = set(choice) - ({draw.choice(inside)} if inside else set())
    return frozenset(changed | ({draw.choice(outside)} if outside else set()))


def _crossed(first: Choice, second: Choice, draw: random.Random) -> Choice:
    """Every unit from either parent."""
    return frozenset(unit for unit in sorted(first | second) if unit in draw.choice((first, second)))


@dataclass(frozen=True)
class SearchPlan:
    """``budget``: of the whole model, in the mixer's unit. Choices are made by KL on ``select``'s text; ``final``
    judges them."""

    budget: float
    select: Judge
    final: Judge
    seed: int = 0


def check_budget(mixer: Mixer, budget: float) -> None:
    """Refuse two recipes that do not differ, and a budget that not even the cheapest mixture fits."""
    if not mixer.units:
        raise SquamataError("the two recipes are the same on this model: give --upgrade a better one")
    if budget < mixer.base:
        digits = ",.0f" if mixer.unit == "bytes" else ".6g"
        least, bits = f"{mixer.base:{digits}} {mixer.unit}", 8 / mixer.forms.parameters
        least += f" ({bits * mixer.base:.3f} bits a parameter)" if mixer.unit == "bytes" else ""
        raise SquamataError(
            f"the budget of {budget:{digits}} is below the {least} that the recipe needs without any upgrade; raise it"
        )


def search_mixture(mixer: Mixer, measured: Sensitivity, plan: SearchPlan, progress: Progress | None = None) -> Search:
    """Spend the budget greedily by ``measured``, and by evolution with as many model runs.

    ``measured``: of the first form's units; those of the second are measured here unless it is float. SquamataError if
    even the cheapest mixture is beyond the budget.
    """
    check_budget(mixer, plan.budget)
    spare = plan.budget - mixer.base
    better: dict[str, float] = {}
    if mixer.high != FLOAT:
        better = measure_units(mixer.forms, mixer.high, mixer.units, plan.select)
    floor, worse = measured.floor_kl, measured.kl_of()
    gain = {unit: worse.get(unit, floor) - better.get(unit, floor) for unit in mixer.units}
    runs = len(mixer.units) + len(better)
    seen = 0

    def loss(choice: Choice) -> float:
        nonlocal seen
        seen += 1
        if progress is not None:
            progress(seen, runs)
        kl = plan.select(mixer.forms.assemble(mixer.sites(choice))).kl
        assert kl is not None
        return kl

    chosen = {
        "nothing upgraded": (frozenset[str](), 0),
        "greedy": (greedy(mixer.cost, gain, spare), runs),
        "evolution": (evolve(mixer.cost, loss, spare, runs, plan.seed), runs),
        "everything upgraded": (frozenset(mixer.units), 0),
    }
    return _judged(mixer, chosen, plan)


def _judged(mixer: Mixer, chosen: Mapping[str, tuple[Choice, int]], plan: SearchPlan) -> Search:
    judged = {name: plan.final(mixer.forms.assemble(mixer.sites(choice))) for name, (choice, _) in chosen.items()}
    mixtures = [_mixture(mixer, name, choice, runs, judged[name]) for name, (choice, runs) in chosen.items()]
    best = min(("greedy", "evolution"), key=lambda name: judged[name].kl or 0.0)
    verdict = difference_of_sums(judged["greedy"].sums, judged["evolution"].sums, "kl").verdict
    return Search(plan.budget, mixer.unit, mixtures, verdict, best)


def _mixture(mixer: Mixer, name: str, choice: Choice, runs: int, judged: Evaluation) -> Mixture:
    assert judged.kl is not None
    stored = mixer.bytes(choice)
    return Mixture(
        name=name,
        upgraded=sorted(choice),
        bytes=stored,
        bits_per_parameter=8 * stored / mixer.forms.parameters,
        price=mixer.price(choice),
        evaluations=runs,
        kl=judged.kl,
        kl_ci=judged.kl_ci,
        perplexity=judged.perplexity,
        perplexity_ci=judged.perplexity_ci,
    )


def as_data(search: Search) -> dict[str, object]:
    """What ``--json`` writes: a budget of bytes is also ``budget_bytes``."""
    found = search.to_dict() | {"mixtures": [mixture.to_dict() for mixture in search.mixtures]}
    return found | ({"budget_bytes": int(search.budget)} if search.unit == "bytes" else {})
