"""Gradients through a layer whose cache is overwritten: they need what was in it, wherever it lay."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.calibrate.passed import passed
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor
from squamata.models.block import Block, ScanCache
from squamata.models.lm import LanguageModel

KINDS = ["mamba1", "mamba2"]
RULES = ({"site": "*.mixer.[xuzBC]", "spec": {"bits": 8}}, {"site": "*.mixer.state", "spec": {"bits": 8}})


def layer(kind: str, rounded: bool) -> Block:
    config = config_of(kind)
    if not rounded:
        return float_model(config, perturbed_tensors(config)).blocks[1]
    checkpoint = quantized(config, perturbed_tensors(config), recipe_of(*RULES), [random_ids(config, 2, 20)])
    return LanguageModel(checkpoint, "simulate").blocks[1]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_may_be_anything_by_the_time_gradients_are_taken(
    kind: str, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, caches = layer(kind, rounded), []
    fresh = block.new_cache

    def remembered(batch: int) -> ScanCache:
        caches.append(fresh(batch))
        return caches[-1]

    monkeypatch.setattr(block, "new_cache", remembered)
    gradients = []
    for scribbled in (False, True):
        h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with use_backend("ref"):
            written, _ = passed(block, h)
        if scribbled:
            for value in (caches[-1].conv, caches[-1].state):
                (value.data if isinstance(value, QTensor) else value).fill_(torch.nan)
        written.square().sum().backward()
        assert h.grad is not None
        gradients.append(h.grad)
    assert bool(torch.isfinite(gradients[0]).all()) and all(torch.equal(*pair) for pair in pairwise(gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_that_of_finite_differences(kind: str) -> None:
    config = config_of(kind)
    tensors = {name: tensor.double() for name, tensor in perturbed_tensors(config).items()}
    block = float_model(config, tensors, torch.float64).blocks[1]
    h = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    with use_backend("ref"):
        passed(block, h)[0].square().sum().backward()
        assert h.grad is not None
        for place in ((0, 0, 3), (0, 4, 20), (0, 6, 31)):
            step, losses = 1e-6, []
            for sign in (1, -1):
                moved = h.detach().clone()
                moved[place] += sign * step
                losses.append(float(passed(block, moved)[0].square().sum()))
            assert float(h.grad[place]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_what_else_is_overwritten_is_noticed() -> None:
    block = layer("mamba1", rounded=False)
    h = torch.randn(1, 5, 32)
    reads = h.clone().requires_grad_() * 1.0
    with use_backend("ref"):
        written, _ = passed(block, reads)
    reads.detach().fill_(0.0)
    with pytest.raises(AssertionError, match="overwritten since it was saved"):
        written.sum().backward()
