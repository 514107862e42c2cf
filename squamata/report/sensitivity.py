"""Which sites and layers are sensitive: one unit quantized at a time, the rest of the model in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from squamata.evaluate.perplexity import Evaluation, paired_difference
from squamata.evaluate.result import Result
from squamata.evaluate.uncertainty import Interval
from squamata.models.lm import LanguageModel
from squamata.report.forms import Forms, sites_at, units_of
from squamata.report.reference import beginning, remembering
from squamata.report.verbs import Verbs
from squamata.run.simulated import placed

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Judge:
    """A text and how models are judged on it, always beside the same float model, whose logits are kept."""

    verbs: Verbs
    documents: Sequence[str]
    reference: LanguageModel
    window: int = 512
    max_tokens: int | None = None
    mode: str = "parallel"
    device: str = "cpu"

    @classmethod
    def of(
        cls, model: str, text: str | Path, verbs: Verbs, window: int, max_tokens: int | None, mode: str = "parallel",
        device: str = "cpu",
    ) -> Judge:  # fmt: skip
        """A judge who compares with the model at this path; ``device``: where all models run, see ``run.simulated``."""
        reference = remembering(placed(verbs.load(model), device))
        return cls(verbs, beginning(text, max_tokens), reference, window, max_tokens, mode, device)

    def on(self, text: str | Path) -> Judge:
        """The same judge on another text."""
        return replace(self, documents=beginning(text, self.max_tokens))

    def __call__(self, model: LanguageModel) -> Evaluation:
        twin = placed(model, self.device)
        return self.verbs.evaluate(twin, self.documents, self.reference, self.window, self.max_tokens, self.mode)


@dataclass(frozen=True)
class UnitRow(Result):
    """One unit quantized alone. ``kl`` in nats a token; ``verdict``: of its perplexity beside the float model's;
    ``bytes_saved``: stored bytes that the unit has less than in float."""

    unit: str
    sites: int
    kl: float
    kl_ci: Interval | None
    perplexity: float
    perplexity_ci: Interval | None
    top1_agreement: float
    verdict: str
    bytes_saved: int


@dataclass(frozen=True)
class Sensitivity(Result):
    """``rows``: most sensitive first. ``floor_kl``: of the model with its transforms alone, which only rounding
    errors of float keep above zero. ``together_kl``: of everything quantized."""

    per: str
    mode: str
    tokens: int
    rows: list[UnitRow]
    float_perplexity: float
    floor_kl: float
    together_kl: float
    together_perplexity: float
    together_kl_ci: Interval | None

    def kl_of(self) -> dict[str, float]:
        """KL by unit."""
        return {row.unit: row.kl for row in self.rows}


def measure_sensitivity(
    forms: Forms, form: str, per: str, judge: Judge, progress: Progress | None = None
) -> Sensitivity:
    """Every unit of a form, alone."""
    units = units_of(forms[form].specs, per, forms.tied)
    plain = judge(forms.assemble({}))
    rows = []
    for number, (name, sites) in enumerate(units.items(), start=1):
        choice = dict.fromkeys(sites, form)
        rows.append(_row(name, judge(forms.assemble(choice)), plain, forms.bytes({}) - forms.bytes(choice), len(sites)))
        if progress is not None:
            progress(number, len(units) + 1)
    together = judge(forms.assemble(sites_at(units, form)))
    if progress is not None:
        progress(len(units) + 1, len(units) + 1)
    return Sensitivity(
        per=per,
        mode=judge.mode,
        tokens=plain.tokens,
        rows=sorted(rows, key=lambda row: -row.kl),
        float_perplexity=plain.perplexity,
        floor_kl=_kl(plain),
        together_kl=_kl(together),
        together_perplexity=together.perplexity,
        together_kl_ci=together.kl_ci,
    )


def measure_units(forms: Forms, form: str, units: Mapping[str, Sequence[str]], judge: Judge) -> dict[str, float]:
    """KL by unit, each alone in this form."""
    known = forms[form].specs
    choices = {unit: {site: form for site in sites if site in known} for unit, sites in units.items()}
    return {unit: _kl(judge(forms.assemble(choice))) for unit, choice in choices.items()}


def _row(name: str, judged: Evaluation, plain: Evaluation, saved: int, sites: int) -> UnitRow:
    assert judged.top1_agreement is not None
    return UnitRow(
        unit=name,
        sites=sites,
        kl=_kl(judged),
        kl_ci=judged.kl_ci,
        perplexity=judged.perplexity,
        perplexity_ci=judged.perplexity_ci,
        top1_agreement=judged.top1_agreement,
        verdict=paired_difference(plain, judged).verdict,
        bytes_saved=saved,
    )


def _kl(judged: Evaluation) -> float:
    assert judged.kl is not None
    return judged.kl


def as_data(measured: Sensitivity, model: str, recipe: str) -> dict[str, object]:
    """What ``--json`` writes and a report reads."""
    rows = [row.to_dict() for row in measured.rows]
    return {"kind": "sensitivity", "model": model, "recipe": recipe} | measured.to_dict() | {"rows": rows}
