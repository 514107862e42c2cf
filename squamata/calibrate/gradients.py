"""Squared gradients of the language-model loss: how much every single weight matters, by the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from squamata.calibrate.whole import streams, swept
from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.scales.statistics import NOT_FINITE
from squamata.spec.recipe import Recipe

Progress = Callable[[int, int], None]


def squared_gradients(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    sequences: Sequence[Tensor],
    names: Collection[str],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Mean over the sequences of (d loss / d weight)^2, float32 of the weight's shape, for the named tensors of layers.

    That is the diagonal of the empirical Fisher information (SqueezeLLM, arXiv 2306.07629, section 4.1). The loss is
    the float model's mean cross-entropy of the next token in one sequence, int64 (L,). ``progress``: sequences done.
    Memory: the model in float32, two tensors a named weight, the stream that enters every layer (layers x L x D), and
    one layer's graph. Deterministic on a CPU. SquamataError, which names the tensor, if one is not finite.
    """
    held = {name: tensor.detach().float() for name, tensor in tensors.items()}
    leaves = {name: held[name].clone().requires_grad_() for name in names}
    model = LanguageModel(Checkpoint(config, held | leaves, Recipe(name="float")), "float")
    squares = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
    for number, ids in enumerate(sequences):
        _take(model, ids[None])
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            squares[name].addcmul_(leaf.grad, leaf.grad, value=1 / len(sequences))
            leaf.grad = None
        if progress:
            progress(number + 1, len(sequences))
    for name, square in squares.items():
        if not bool(torch.isfinite(square).all()):
            raise SquamataError(f"{name}: gradients of the loss with {NOT_FINITE}")
    return squares


def _take(model: LanguageModel, ids: Tensor) -> None:
    """Give the model's leaves the gradient of the loss of one sequence, ids (1, L)."""
    with use_backend("ref"):
        with torch.no_grad():
            entering = streams(model, ids)
        swept(model, entering, lambda logits: cross_entropy(logits[0, :-1], ids[0, 1:]))
