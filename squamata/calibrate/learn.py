"""Learned scales: trained until a layer's output is what the float layer gives, or (``whole.py``) the model's logits
are what the float model gives. No labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from squamata import scales
from squamata.calibrate.observe import Stream
from squamata.calibrate.passed import passed
from squamata.errors import SquamataError, about, nearest
from squamata.kernels.dispatch import use_backend
from squamata.kernels.site import Site
from squamata.models.block import Block
from squamata.spec.parameters import checked_parameters
from squamata.spec.recipe import Recipe

OWN_ARGUMENTS = 3  # teacher, student, stream: what a recipe does not set
AGAINST = ("layer", "logits")

Steps = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0)]


def lsq(
    teacher: Block, student: Block, stream: Stream, steps: Steps = 100, learning_rate: Rate = 0.01
) -> dict[str, Tensor]:
    """Learned step sizes (LSQ, Esser et al. 2020, equation 3) of every static activation site of one layer.

    ``teacher``: the layer in float. ``student``: the same quantized, in mode *simulate*, with the scales to start from.
    ``stream``: what enters the layer. Adam on log(scale), which makes the paper's factor on the gradient needless, one
    sequence a step in turn, its rate falling linearly to zero; the loss is the squared error of the layer's output over
    its square, where the paper trains with the task's, and the weights too. Second numbers (zero points) stay.
    Returns ``NAME.scale`` of every site in stored form; those it started from if the error over the whole stream has
    not become smaller. The state's scale stays too: a parallel pass rounds the state only after the last token.
    Deterministic.
    """
    sequences = [h[row, None] for h in stream for row in range(len(h))]

    def slopes(step: int, chosen: Mapping[str, Tensor]) -> None:
        put(student.sites.values(), chosen)
        with torch.enable_grad():
            _loss(teacher, student, sequences[step % len(sequences)]).backward()  # type: ignore[no-untyped-call]

    error = partial(reconstruction_error, teacher, student, stream)
    return train(list(student.sites.values()), slopes, error, steps, learning_rate)


def train(
    sites: list[Site],
    slopes: Callable[[int, Mapping[str, Tensor]], None],
    error: Callable[[], float],
    steps: int,
    learning_rate: float,
) -> dict[str, Tensor]:
    """Adam on log(scale) of those of the sites that have a static scale to learn, its rate falling linearly to zero.

    ``slopes(step, chosen)`` adds the loss's gradient to the chosen scales, leaves by site name. Returns ``NAME.scale``
    in stored form; those it started from if ``error()`` has not become smaller.
    """
    sites = [site for site in sites if _learnable(site)]
    start = {site.name: _scale(site) for site in sites}
    logs = {name: scale.log() for name, scale in start.items()}
    if not logs:
        return {}
    optimizer = torch.optim.Adam(logs.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with use_backend("ref"):
        before = error()
        for step in range(steps):
            chosen = {name: log.exp().requires_grad_() for name, log in logs.items()}
            slopes(step, chosen)
            for name, scale in chosen.items():
                logs[name].grad = None if scale.grad is None else scale.grad * scale.detach()  # d / d log(scale)
            optimizer.step()
            schedule.step()
        learned = {site.name: stored(site, logs[site.name].exp()) for site in sites}
        put(sites, learned)
        if error() >= before:
            learned = start
            put(sites, start)
    return {f"{name}.scale": scale for name, scale in learned.items()}


TUNERS: dict[str, Callable[..., dict[str, Tensor]]] = {"lsq": lsq}


def check_tuner(recipe: Recipe) -> None:
    """Refuse an unknown tuner or parameter, naming the nearest."""
    if recipe.tune is not None:
        if recipe.tune.name not in TUNERS:
            known = nearest(recipe.tune.name, TUNERS)
            raise SquamataError(f"recipe {recipe.name}: no way to tune named '{recipe.tune.name}'{known}")
        against = recipe.tune.parameters.get("against", "layer")
        if against not in AGAINST:
            raise SquamataError(
                f"tune {recipe.tune.name}: against '{against}' is nothing{nearest(str(against), AGAINST)}"
            )
        parameters_of(recipe)


def aims_at_logits(recipe: Recipe) -> bool:
    """True if the recipe trains scales against the model's logits, not a layer's output."""
    return recipe.tune is not None and recipe.tune.parameters.get("against") == "logits"


def tune(recipe: Recipe, teacher: Block, student: Block, stream: Stream) -> dict[str, Tensor]:
    """What the recipe's tuner makes of one layer's site scales, by full name; nothing without a tuner."""
    if recipe.tune is None:
        return {}
    for site in teacher.sites.values():
        site.observer = None  # it has seen the stream already
    return TUNERS[recipe.tune.name](teacher, student, stream, **parameters_of(recipe))


@torch.no_grad()
def reconstruction_error(teacher: Block, student: Block, stream: Stream) -> float:
    """Mean over the batches of the student's squared error at the layer's output, over the output's square."""
    return sum(float(_loss(teacher, student, batch)) for batch in stream) / len(stream)


def _loss(teacher: Block, student: Block, h: Tensor) -> Tensor:
    with torch.no_grad():
        target, _ = passed(teacher, h)
    written, _ = passed(student, h)
    return (written - target).square().mean() / target.square().mean().clamp_min(1e-30)


def _learnable(site: Site) -> bool:
    spec = site.spec  # an activation's features arrive as one axis
    return site.scale is not None and site.layout.flat and spec is not None and not spec.absolute


def _scale(site: Site) -> Tensor:
    assert site.scale is not None
    return site.scale.detach().clone()


def stored(site: Site, scale: Tensor) -> Tensor:
    """The scale in the precision that the site stores."""
    assert site.spec is not None
    with about(site.name):
        return scales.as_stored(scale, site.spec)


def put(sites: Iterable[Site], chosen: Mapping[str, Tensor]) -> None:
    """Give those of the sites that are named these scales; second numbers stay."""
    for site in sites:
        if site.name in chosen:
            site.set_scale(chosen[site.name], site.second)


def parameters_of(recipe: Recipe) -> dict[str, Any]:
    """What the recipe sets of its tuner, ``against`` excepted; SquamataError for what it does not take."""
    assert recipe.tune is not None
    given = {key: value for key, value in recipe.tune.parameters.items() if key != "against"}
    return checked_parameters(TUNERS[recipe.tune.name], given, OWN_ARGUMENTS, f"tune {recipe.tune.name}")
