"""What needs the whole model: scales chosen or trained by KL(float || simulated) of the logits. No labels.

A second pass, after every layer was quantized by itself. Memory: the float and the quantized model, what the float
model gives on the calibration text before its head (samples x length x d_model x 4 bytes), the same of one sequence
for every layer, and one layer's graph: gradients are swept back a layer at a time, from the stream that entered it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from squamata import scales
from squamata.calibrate.learn import Rate, Steps, aims_at_logits, check_tuner, parameters_of, put, train
from squamata.calibrate.passed import passed
from squamata.errors import SquamataError
from squamata.kernels import ops
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site
from squamata.models.block import Block
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites

Choices = dict[str, list[scales.Scale]]  # site -> what every candidate makes of it
Progress = Callable[[int, int], None]

_NOT_SEARCHED = {
    "state": "of a state, which a parallel pass rounds only after its last token",
    "weight": "of a weight",
    "parameter": "of a parameter",
}


def needed(recipe: Recipe, specs: Mapping[str, QuantSpec]) -> str:
    """What of a recipe needs the whole model, for a message; empty if nothing does."""
    if aims_at_logits(recipe):
        return "'against: logits'"
    return "'by: kl'" if any(scales.searched_by_output(spec) for spec in specs.values()) else ""


def check(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse an unknown tuner, a search by output that a parallel pass would not feel, and a correction before it."""
    check_tuner(recipe)
    infos, specs = all_sites(config.blocks), recipe.resolve(config.blocks)
    if recipe.correct is not None and (what := needed(recipe, specs)):
        raise SquamataError(f"recipe {recipe.name}: 'correct' goes layer by layer, {what} after all: leave one out")
    for site, spec in specs.items():
        if scales.searched_by_output(spec) and (infos[site].kind != "activation" or spec.dynamic):
            what = _NOT_SEARCHED.get(infos[site].kind, "one that is taken at run time")
            raise SquamataError(f"{site}: 'by: kl' chooses scales of activations, not {what}; use 'by: mse'")


def refined(
    recipe: Recipe,
    float_model: LanguageModel,
    config: ModelConfig,
    parts: list[dict[str, Value]],
    batches: Sequence[Tensor],
    choices: Choices,
    progress: Progress | None = None,
) -> list[dict[str, Value]]:
    """The parts of a quantized model with the scales that its logits are best with.

    ``config``: of the quantized model. ``batches``: calibration ids (B, L). ``choices``: what each candidate of a
    search by output makes of a site. First the searches, in the order the data meets the sites; then the training.
    ``progress``: blocks searched, then training steps.
    """
    student = LanguageModel(Checkpoint.of_parts(config, recipe, parts), "simulate")
    with use_backend("ref"):
        examples = [Example.of(float_model, ids) for ids in batches]
        found = choose(student, examples, choices, progress)
        if aims_at_logits(recipe):
            rows = [row for example in examples for row in example.rows()]
            found |= lsq(student, rows, progress=progress, **parameters_of(recipe))
    return [{name: found.get(name, value) for name, value in part.items()} for part in parts]


@dataclass(frozen=True)
class Example:
    """Token ids (B, L), and what the float model's head makes logits of (B, L, D)."""

    ids: Tensor
    before_head: Tensor
    head: Callable[[Tensor], Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: LanguageModel, ids: Tensor) -> Example:
        """What a float model makes of some ids."""
        return cls(ids, streams(model, ids)[-1], lambda h: model.logits(h, None))

    def rows(self) -> list[Example]:
        """Its sequences, one by one."""
        return [Example(self.ids[row, None], self.before_head[row, None], self.head) for row in range(len(self.ids))]

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(float || logits), mean of the tokens, nats."""
        with torch.no_grad():
            p = self.head(self.before_head).log_softmax(-1)
        return (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean()


def streams(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The residual stream that enters every layer, and what leaves the last: float (B, L, D) each."""
    found: list[Tensor] = [ops.embedding(ids, model.embedding, model.dtype)]
    for block in model.blocks:
        found.append(advanced(block, found[-1]))
    return found


def advanced(block: Block, h: Tensor) -> Tensor:
    """The residual stream after a layer."""
    written, residual = passed(block, h)
    return residual + written


@torch.no_grad()
def choose(
    student: LanguageModel, examples: Sequence[Example], choices: Choices, progress: Progress | None = None
) -> dict[str, Tensor]:
    """At every site of ``choices``, in the order the data meets them, the candidate with the least KL, the first of
    equally good ones; all other sites are as quantized, those before it as chosen already. Stored site tensors.
    """
    found: dict[str, Tensor] = {}
    stream = [ops.embedding(example.ids, student.embedding, student.dtype) for example in examples] if choices else []
    for number, block in enumerate(student.blocks if choices else ()):
        cost = partial(_kl, student, examples, stream, student.blocks[number:])
        for site in (site for site in block.sites.values() if site.name in choices):
            found |= _best(site, choices[site.name], cost)
        stream = [advanced(block, h) for h in stream]
        if progress:
            progress(number + 1, len(student.blocks))
    if student.head_site.name in choices:
        site = student.head_site
        found |= _best(site, choices[site.name], partial(_kl, student, examples, stream, ()))
    return found


def _best(site: Site, candidates: Sequence[scales.Scale], cost: Callable[[], float]) -> dict[str, Tensor]:
    """The site's tensors with the candidate of least cost, which it keeps."""
    costs = []
    for candidate in candidates:
        site.set_scale(*candidate)
        costs.append(cost())
    scale, second = candidates[costs.index(min(costs))]
    site.set_scale(scale, second)
    assert site.spec is not None
    return {f"{site.name}.scale": scale} | ({} if second is None else {f"{site.name}.{site.spec.second}": second})


def _kl(
    student: LanguageModel, examples: Sequence[Example], stream: Sequence[Tensor], blocks: Sequence[Block]
) -> float:
    """Mean KL of the tokens when these streams go through these blocks and the head."""
    total = 0.0
    for example, h in zip(examples, stream, strict=True):
        for block in blocks:
            h = advanced(block, h)
        total += float(example.divergence(student.logits(h, None))) * example.ids.numel()
    return total / sum(example.ids.numel() for example in examples)


@torch.no_grad()
def mean_divergence(student: LanguageModel, examples: Sequence[Example]) -> float:
    """Mean KL(float || student) over all tokens, nats."""
    entering = [ops.embedding(example.ids, student.embedding, student.dtype) for example in examples]
    return _kl(student, examples, entering, student.blocks)


def lsq(
    student: LanguageModel,
    examples: Sequence[Example],
    steps: Steps = 100,
    learning_rate: Rate = 0.01,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """``learn.lsq`` with all scales of the model trained together, the head's input included, against the float logits.

    One example a step in turn. Returns ``NAME.scale`` of every static activation site in stored form; those it started
    from if the KL over all examples has not become smaller. Deterministic.
    """

    def slopes(step: int, chosen: Mapping[str, Tensor]) -> None:
        sweep(student, examples[step % len(examples)], chosen)
        if progress:
            progress(step + 1, steps)

    return train(list(student.sites()), slopes, lambda: mean_divergence(student, examples), steps, learning_rate)


def sweep(student: LanguageModel, example: Example, chosen: Mapping[str, Tensor]) -> float:
    """KL of an example with these scales (leaves, by site name); adds to each its gradient.

    One layer's graph at a time: the layers are run twice, forwards for the stream that enters each, and backwards, each
    from that stream.
    """
    put(student.sites(), {name: leaf.detach() for name, leaf in chosen.items()})
    with torch.no_grad():
        entering = streams(student, example.ids)
    put(student.sites(), chosen)
    return swept(student, entering, example.divergence)


def swept(model: LanguageModel, entering: list[Tensor], loss_of: Callable[[Tensor], Tensor]) -> float:
    """A loss of the logits; adds its gradient to every leaf that the model's layers and head compute with.

    ``entering``: what ``streams`` gave, used up from its end.
    """
    with torch.enable_grad():
        h = entering.pop().requires_grad_()
        loss = loss_of(model.logits(h, None))
        loss.backward()  # type: ignore[no-untyped-call]
        for block in reversed(model.blocks):
            slope = h.grad
            h = entering.pop().requires_grad_()
            advanced(block, h).backward(slope)  # type: ignore[no-untyped-call]
    return float(loss.detach())
