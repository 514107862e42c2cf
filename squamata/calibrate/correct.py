"""Corrections: what quantizing took from a layer's output on average, given back as a bias of its out_proj."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from squamata.calibrate.observe import Lengths, Stream, run_layer
from squamata.errors import SquamataError, nearest
from squamata.models.block import Block
from squamata.models.config import OUTPUT_BIAS as OUTPUT_BIAS
from squamata.spec.parameters import checked_parameters
from squamata.spec.recipe import Recipe

OWN_ARGUMENTS = 1  # lost: what a recipe does not set

Decay = Annotated[float, Field(ge=0.0, le=1.0)]


def mean(lost: Tensor, decay: Decay = 0.16) -> Tensor:
    """c = decay (mean_float - mean_quantized) a channel: mean correction (SSDi8, arXiv 2608.21952).

    ``lost``: the difference of the means of out_proj's output, each model on its own stream, float64 (D,). The layers
    before are corrected already, so what a layer inherits from them is corrected in it too, which ``decay`` damps.
    """
    return decay * lost


CORRECTIONS: dict[str, Callable[..., Tensor]] = {"mean": mean}


def check_correction(recipe: Recipe) -> None:
    """Refuse an unknown correction or parameter, naming the nearest."""
    if recipe.correct is not None:
        if recipe.correct.name not in CORRECTIONS:
            known = nearest(recipe.correct.name, CORRECTIONS)
            raise SquamataError(f"recipe {recipe.name}: no correction named '{recipe.correct.name}'{known}")
        _parameters(recipe)


def correction(recipe: Recipe, lost: Tensor) -> Tensor:
    """What the recipe adds to a layer's output whose mean has lost so much, float32 (D,)."""
    assert recipe.correct is not None
    return CORRECTIONS[recipe.correct.name](lost, **_parameters(recipe)).float()


def _parameters(recipe: Recipe) -> dict[str, Any]:
    assert recipe.correct is not None
    method, given = CORRECTIONS[recipe.correct.name], recipe.correct.parameters
    return checked_parameters(method, given, OWN_ARGUMENTS, f"correct {recipe.correct.name}")


def mean_output(block: Block, stream: Stream, lengths: Lengths | None = None) -> Tensor:
    """``run_layer``, and the mean over all tokens of what the block wrote to the stream, float64 (D,)."""
    before = _mean(stream, lengths)
    run_layer(block, stream, lengths)
    return _mean(stream, lengths) - before


def _mean(stream: Stream, lengths: Lengths | None) -> Tensor:
    """Mean over the tokens of a stream; ``lengths``: as for ``run_layer``."""
    total = torch.zeros(stream[0].shape[-1], dtype=torch.float64, device=stream[0].device)
    count = 0
    for h, own in zip(stream, lengths or [None] * len(stream), strict=True):
        for row, length in enumerate(own or [h.shape[1]] * len(h)):
            total += h[row, :length].sum(0, dtype=torch.float64)
            count += length
    return total / count
