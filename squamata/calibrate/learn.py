"""Learned scales: a layer's site scales are trained until its output is what the float layer gives. No labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from squamata import scales
from squamata.calibrate.observe import Stream
from squamata.errors import SquamataError, about, nearest
from squamata.kernels.dispatch import use_backend
from squamata.kernels.site import Site
from squamata.models.block import Block
from squamata.spec.parameters import checked_parameters
from squamata.spec.recipe import Recipe

OWN_ARGUMENTS = 3  # teacher, student, stream: what a recipe does not set

Steps = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0)]


def lsq(
    teacher: Block, student: Block, stream: Stream, steps: Steps = 100, learning_rate: Rate = 0.01
) -> dict[str, Tensor]:
    """Learned step sizes (LSQ, Esser et al. 2020, equation 3) of every static activation site of one layer.

    ``teacher``: the layer in float. ``student``: the same quantized, in mode *simulate*, with the scales to start from.
    ``stream``: what enters the layer. Adam on log(scale), one sequence a step in turn, its rate falling linearly to
    zero; the loss is the squared error of the layer's output over its square. Second numbers (zero points) stay.
    Returns ``NAME.scale`` of every site in stored form; those it started from if the error over the whole stream has
    not become smaller. The state's scale stays too: a parallel pass rounds the state only after the last token.
    Deterministic.
    """
    sites = [site for site in student.sites.values() if _learnable(site)]
    start = {site.name: _scale(site) for site in sites}
    logs = {name: scale.log().requires_grad_() for name, scale in start.items()}
    if not logs:
        return {}
    sequences = [h[row, None] for h in stream for row in range(len(h))]
    optimizer = torch.optim.Adam(logs.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with use_backend("ref"):
        before = reconstruction_error(teacher, student, stream)
        for step in range(steps):
            _put(sites, {name: log.exp() for name, log in logs.items()})
            optimizer.zero_grad()
            with torch.enable_grad(), allow_mutation_on_saved_tensors():  # caches are updated in place
                _loss(teacher, student, sequences[step % len(sequences)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        learned = {site.name: _stored(site, logs[site.name].detach().exp()) for site in sites}
        _put(sites, learned)
        if reconstruction_error(teacher, student, stream) >= before:
            learned = start
            _put(sites, start)
    return {f"{name}.scale": scale for name, scale in learned.items()}


TUNERS: dict[str, Callable[..., dict[str, Tensor]]] = {"lsq": lsq}


def check(recipe: Recipe) -> None:
    """Refuse an unknown tuner or parameter, naming the nearest."""
    if recipe.tune is not None:
        if recipe.tune.name not in TUNERS:
            known = nearest(recipe.tune.name, TUNERS)
            raise SquamataError(f"recipe {recipe.name}: no way to tune named '{recipe.tune.name}'{known}")
        _parameters(recipe)


def tune(recipe: Recipe, teacher: Block, student: Block, stream: Stream) -> dict[str, Tensor]:
    """What the recipe's tuner makes of one layer's site scales, by full name; nothing without a tuner."""
    if recipe.tune is None:
        return {}
    for site in teacher.sites.values():
        site.observer = None  # it has seen the stream already
    return TUNERS[recipe.tune.name](teacher, student, stream, **_parameters(recipe))


@torch.no_grad()
def reconstruction_error(teacher: Block, student: Block, stream: Stream) -> float:
    """Mean over the batches of the student's squared error at the layer's output, over the output's square."""
    return sum(float(_loss(teacher, student, batch)) for batch in stream) / len(stream)


def _loss(teacher: Block, student: Block, h: Tensor) -> Tensor:
    with torch.no_grad():
        target = _output(teacher, h)
    return (_output(student, h) - target).square().mean() / target.square().mean().clamp_min(1e-30)


def _output(block: Block, h: Tensor) -> Tensor:
    written, _ = block.forward(h, None, block.new_cache(h.shape[0]))
    return written


def _learnable(site: Site) -> bool:
    return site.scale is not None and site.layout.flat  # an activation, whose features arrive as one axis


def _scale(site: Site) -> Tensor:
    assert site.scale is not None
    return site.scale.detach().clone()


def _stored(site: Site, scale: Tensor) -> Tensor:
    assert site.spec is not None
    with about(site.name):
        return scales.as_stored(scale, site.spec)


def _put(sites: list[Site], chosen: dict[str, Tensor]) -> None:
    for site in sites:
        site.set_scale(chosen[site.name], site.second)


def _parameters(recipe: Recipe) -> dict[str, object]:
    assert recipe.tune is not None
    tuner = TUNERS[recipe.tune.name]
    return checked_parameters(tuner, recipe.tune.parameters, OWN_ARGUMENTS, f"tune {recipe.tune.name}")
