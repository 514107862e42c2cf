"""Outlier channels that were planted are found, and zeroing is what zero weights do."""

from __future__ import annotations

import pytest
import torch
from fakes import ByteTokenizer
from tiny import config_of, perturbed_tensors

import squamata
from squamata.errors import SquamataError
from squamata.load.hub import bundled
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.report.outliers import outlier_channels, study_outliers, zeroing
from squamata.report.sensitivity import Judge
from squamata.report.verbs import Verbs
from squamata.spec.recipe import Recipe

TEXTS = ["the first text has some words", "and a second one has others", "a third, with commas, too"]


def model_of(kind: str, tensors: dict[str, torch.Tensor]) -> LanguageModel:
    config = config_of(kind, vocab_size=257, d_inner=128)
    return LanguageModel(Checkpoint(config, tensors, Recipe.read("float")), "float", tokenizer=ByteTokenizer())


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    return perturbed_tensors(config_of(kind, vocab_size=257, d_inner=128), seed=2)


def judge_of(model: LanguageModel, verbs: Verbs) -> Judge:
    return Judge(verbs, TEXTS, model, window=64)


def test_the_definition_is_six_deviations_above_the_mean() -> None:
    peaks = torch.ones(100)
    assert outlier_channels(peaks) == ()  # all alike: nothing stands out
    peaks[7] = 3.0  # mean 1.02, deviation 0.199
    assert outlier_channels(peaks, 9.9) == (7,) and outlier_channels(peaks, 10.0) == ()
    peaks[[3, 7]] = 3.0
    assert outlier_channels(peaks) == (3, 7)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_planted_channels_are_found_with_their_persistence(kind: str, verbs: Verbs) -> None:
    tensors = tensors_of(kind)
    for layer in (0, 1):
        tensors[f"layers.{layer}.mixer.conv.bias"] = tensors[f"layers.{layer}.mixer.conv.bias"] * 0.1
        tensors[f"layers.{layer}.mixer.conv.bias"][5] = 60.0  # SiLU(60 + x): larger than all else, in every document
    tensors["layers.1.mixer.conv.bias"][9] = 60.0
    model = model_of(kind, tensors)
    found = study_outliers(model, judge_of(model_of(kind, tensors), verbs), "*.mixer.u")
    first, second = found.rows
    assert (first.site, first.layer, first.part, first.channels) == ("layers.0.mixer.u", 0, "mixer.u", 128)
    assert first.outliers == [5] and second.outliers == [5, 9]
    assert first.documents == second.documents == 1.0 and found.documents == 3
    assert first.layers == 1.0 and second.layers == 0.5  # channel 9 is one in layer 1 only
    assert first.largest > 5
    (zeroed,) = found.zeroed
    assert zeroed.part == "mixer.u" and zeroed.channels == 3
    assert zeroed.kl > zeroed.random_kl > 0 and zeroed.perplexity != found.float_perplexity


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_zeroing_is_what_zero_weights_do(kind: str) -> None:
    tensors = tensors_of(kind)
    ids = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))
    channels = (2, 11)
    cases = {
        "mixer.u": ("mixer.conv.weight", "mixer.conv.bias"),  # rows; SiLU(0) = 0
        "mixer.in": ("norm.weight",),
        "mixer.z": ("mixer.in_proj.weight",),  # rows of z: first in Mamba-2, second half in Mamba-1
    }
    plain = model_of(kind, tensors)
    before = plain(ids)
    for site, names in cases.items():
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        rows = torch.tensor(channels) + (128 if site == "mixer.z" and kind == "mamba1" else 0)
        for name in names:
            changed[f"layers.1.{name}"][rows] = 0.0
        with zeroing(plain, {f"layers.1.{site}": channels}):
            zeroed = plain(ids)
        torch.testing.assert_close(zeroed, model_of(kind, changed)(ids))
        assert not torch.allclose(zeroed, before)
    assert torch.equal(plain(ids), before)  # observers are gone


def test_a_glob_without_activations_is_refused(verbs: Verbs) -> None:
    model = model_of("mamba2", tensors_of("mamba2"))
    with pytest.raises(SquamataError, match="no activation site matches"):
        study_outliers(model, judge_of(model, verbs), "*.mixer.state")


def test_on_the_bundled_model(verbs: Verbs) -> None:
    """Few channels, and they matter more than others (the paper's finding, at 5M)."""
    model = squamata.load("bundled", mode="float")
    judge = Judge.of("bundled", bundled() / "excerpt.jsonl", verbs, window=64, max_tokens=256)
    found = study_outliers(model, judge, "*.mixer.[xu]")
    share = sum(len(row.outliers) for row in found.rows) / sum(row.channels for row in found.rows)
    assert 0 < share < 0.01
    assert all(row.kl > row.random_kl for row in found.zeroed)
    assert found.rows[0].documents is None  # 256 tokens are within one document
