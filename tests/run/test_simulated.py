"""A simulated model: the numbers of mode *simulate*, whatever runs side by side, and no tensor on a wrong device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fakes import ByteTokenizer
from tiny import config_of, perturbed_tensors, quantized, random_ids

from squamata.errors import SquamataError
from squamata.evaluate import evaluate
from squamata.evaluate import perplexity as judged_by
from squamata.evaluate.measure import ACCELERATOR
from squamata.kernels.dispatch import use_backend
from squamata.kernels.hadamard import Rotation
from squamata.models.block import Block
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.run import simulated
from squamata.run.simulated import SimulatedModel, placed
from squamata.spec.recipe import Recipe

RECIPES = (
    "quamba-w8a8",
    "quamba-w8a8-static-state",
    "quamba2-w4a8-like-upstream",
    "format-dual-scale-5",
    "quamba-w4a4",
)
DOCUMENTS = ["The snake sheds its skin, and grows.", "A second", "x", "And a fourth one, longer than a window of it."]


def made(kind: str, recipe: str, **sizes: int) -> Checkpoint:
    config = config_of(kind, **sizes)
    return quantized(config, perturbed_tensors(config), Recipe.read(recipe), [random_ids(config, 4, 40)])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_gives_the_numbers_of_the_mode_simulate(kind: str, recipe: str) -> None:
    checkpoint = made(kind, recipe)
    model, twin = LanguageModel(checkpoint, "simulate"), SimulatedModel(checkpoint, "cpu")
    ids = random_ids(checkpoint.config, 3, 21, seed=1)
    with use_backend("ref"):
        assert torch.equal(twin(ids), model(ids))
        cache, own = model.new_cache(3), twin.new_cache(3)
        for column in ids.unbind(1):
            assert torch.equal(twin.step(column, own), model.step(column, cache))


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_many_windows_at_once_give_the_numbers_of_one_at_a_time(
    kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: more rows, and the logits of several steps measured together."""
    checkpoint, plain = (made(kind, name, vocab_size=257) for name in ("quamba-w8a8", "float"))
    model, against = (SimulatedModel(some, "cpu", ByteTokenizer()) for some in (checkpoint, plain))
    alone = evaluate(model, DOCUMENTS, against, window=8, mode=mode, batch=1)
    monkeypatch.setattr(judged_by, "at_once", lambda model: replace(ACCELERATOR, steps=3))
    together = evaluate(model, DOCUMENTS, against, window=8, mode=mode)
    assert together.tokens == alone.tokens
    assert together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-5)
    assert together.kl == pytest.approx(alone.kl, rel=1e-3) and together.top1_agreement == alone.top1_agreement


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rotations known without reading their tensors: those of the device *meta* hold no numbers."""
    monkeypatch.setattr(simulated, "check_device", lambda device: None)
    monkeypatch.setattr(Block, "rotation", lambda block: Rotation.of_size(block.config.d_inner))
    yield


@pytest.mark.usefixtures("rotations")
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("recipe", ["float", *RECIPES, "format-soft-edge-9", "format-int5"])
def test_everything_is_on_its_device(kind: str, recipe: str) -> None:
    """*meta* stands for a GPU: an op on tensors of two devices fails, and so does one that waits for a number."""
    model = SimulatedModel(made(kind, recipe), "meta")
    cache = model.new_cache(3)
    assert model.forward(torch.zeros(3, 20, dtype=torch.int64), cache).device.type == "meta"
    assert LanguageModel.step(model, torch.zeros(3, dtype=torch.int64), cache).device.type == "meta"


def test_a_model_stays_itself_on_the_cpu_and_a_missing_gpu_is_said() -> None:
    model = LanguageModel(made("mamba2", "quamba-w8a8"))
    assert placed(model, "cpu") is model
    with pytest.raises(SquamataError, match="no device 'tpu'"):
        placed(model, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(SquamataError, match="torch sees no GPU here"):
            placed(model, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_gpu_gives_the_numbers_of_the_cpu(kind: str) -> None:
    checkpoint = made(kind, "quamba-w8a8")
    twin, model = SimulatedModel(checkpoint, "cuda"), SimulatedModel(checkpoint, "cpu")
    ids = random_ids(checkpoint.config, 3, 21, seed=1)
    torch.testing.assert_close(twin(ids).cpu(), model(ids), rtol=1e-3, atol=1e-3)
    cache, own = model.new_cache(3), twin.new_cache(3)
    errors = []
    for column in ids.unbind(1):
        for part, theirs in zip(simulated._parts(own), simulated._parts(cache), strict=True):
            part.copy_(theirs)  # a code that rounds the other way at a tie would be carried on
        found, wanted = twin.step(column, own).cpu(), model.step(column, cache)
        errors += ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).tolist()
    assert sorted(errors)[len(errors) // 2] < 1e-5 and max(errors) < 0.1, errors  # few meet a tie
