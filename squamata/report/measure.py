"""One row of a study: quantize, judge, look at distributions."""

from __future__ import annotations

import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from squamata import __version__
from squamata.errors import SquamataError, about
from squamata.evaluate.size import bytes_by_part
from squamata.kernels.dispatch import use_backend
from squamata.kernels.site import Mode
from squamata.memory import peak_rss_bytes
from squamata.models.lm import LanguageModel
from squamata.report.accuracy import measure_tasks
from squamata.report.distributions import observe_distributions
from squamata.report.plan import RowPlan
from squamata.report.reference import References, beginning, parameter_count
from squamata.report.rows import Arrays, pack_sums
from squamata.report.verbs import Verbs
from squamata.run.model import Model
from squamata.run.simulated import described, placed

DISTRIBUTION_TOKENS = 2048
COMPARED_TOKENS = 128  # of the first text, in simulation and by integers

_references = References()  # of this process


@dataclass(frozen=True)
class Outcome:
    """A row and its details; or, in ``error``, the line that says why there is none, with the ``traceback`` of what
    nobody foresaw."""

    plan: RowPlan
    row: dict[str, Any] = field(default_factory=dict)
    details: Arrays = field(default_factory=dict)
    error: str | None = None
    traceback: str | None = None


def measure_row(plan: RowPlan, verbs: Verbs, scratch: Path | None = None, device: str = "cpu") -> Outcome:
    """Measure a row. ``scratch``: where the checkpoint lives meanwhile; the system's folder for such unless given.
    ``device``: *cpu*, by the integer kernels; *cuda*: the current GPU, by simulation, which they agree with.

    Whatever goes wrong becomes the outcome's ``error``: the other rows are still worth measuring.
    """
    try:
        with about(plan.name), tempfile.TemporaryDirectory(dir=scratch) as folder:
            return _measure(plan, verbs, Path(folder) / "checkpoint", device)
    except SquamataError as error:
        return Outcome(plan, error=str(error))
    except Exception as error:  # a matrix that is singular, memory that is short: one row's trouble, not the study's
        said = " ".join(str(error).split())[:200]
        return Outcome(plan, error=f"{plan.name}: {type(error).__name__}: {said}", traceback=traceback.format_exc())


def _measure(plan: RowPlan, verbs: Verbs, checkpoint: Path, device: str) -> Outcome:
    started = time.perf_counter()
    options = {"seed": plan.seed, "device": device, "recoverable": False}
    done = verbs.quantize(plan.model, plan.recipe, checkpoint, plan.calibration, **options)
    model = verbs.load(checkpoint)
    quantized = time.perf_counter()
    judged_model = placed(model, device)
    evaluations, details = _judge(plan, verbs, judged_model, device)
    tasks, hits = measure_tasks(judged_model, plan.tasks, plan.description.get("task_limit"))
    details |= hits
    judged = time.perf_counter()
    distributions = plan.description["distributions"]
    if distributions:
        first = next(iter(plan.texts.values()))
        details |= observe_distributions(
            judged_model, beginning(first, DISTRIBUTION_TOKENS), distributions, DISTRIBUTION_TOKENS
        )
    row = {"id": plan.id} | plan.labels | {"seed": plan.seed, "architecture": model.config.architecture}
    row |= {name: evaluations[0][name] for name in ("perplexity", "kl", "top1_agreement", "bits_per_byte")}
    row["simulation"] = _simulation_beside_integers(plan, model)
    row |= {"bytes": bytes_by_part(model), "parameters": parameter_count(plan.model), "evaluations": evaluations}
    if tasks:
        row["tasks"] = tasks
    if verbs.hardware is not None:
        row["hardware"] = dict(verbs.hardware(model.config, plan.recipe))
    provenance = {key: value for key, value in plan.description.items() if key not in ("labels", "seed", "recipe")}
    row |= {
        "resolved_recipe": plan.recipe.to_mapping(),
        "provenance": provenance | {"squamata_version": __version__, "calibration_drawn": done.calibration},
        "quantize_seconds": quantized - started,
        "evaluate_seconds": judged - quantized,
        "measured_on": described(device),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    return Outcome(plan, row, details)


@torch.no_grad()
def _simulation_beside_integers(plan: RowPlan, model: Model) -> dict[str, float]:
    """How far the logits of mode *simulate* are from mode *integer*'s, both by the reference kernels: nothing at all,
    by construction; a study says so of every row."""
    corpus = _references.corpus(
        next(iter(plan.texts.values())), plan.description["window"], plan.description["max_tokens"]
    )
    ids = torch.tensor([corpus.windows[0].ids[:COMPARED_TOKENS]])
    logits = []
    with use_backend("ref"):
        modes: tuple[Mode, ...] = ("simulate", "integer")
        for mode in modes:
            model.set_mode(mode)
            logits.append(model.forward(ids, model.new_cache()))
    return {"tokens": ids.shape[1], "largest_difference": float((logits[0] - logits[1]).abs().max())}


def _judge(plan: RowPlan, verbs: Verbs, model: LanguageModel, device: str) -> tuple[list[dict[str, Any]], Arrays]:
    """Every text in every mode that is asked of it."""
    reference = _references.get(plan.model, verbs, device)
    max_tokens, window, modes = (plan.description[name] for name in ("max_tokens", "window", "modes"))
    evaluations: list[dict[str, Any]] = []
    details: Arrays = {}
    for label, path in plan.texts.items():
        corpus = _references.corpus(path, window, max_tokens)
        for mode in modes:
            if isinstance(modes, list) or label in modes[mode]:
                judged = verbs.evaluate(model, corpus, reference, window, max_tokens, mode)
                details |= pack_sums(len(evaluations), judged.sums)
                evaluations.append({"text": label} | judged.to_dict())
    return evaluations, details
