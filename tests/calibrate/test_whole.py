"""Scales that the whole model's logits are best with: gradients by other means, and KL that really falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    config_of,
    float_model,
    perturbed_tensors,
    quantized,
    random_ids,
    recipe_of,
    write_tiny_folder,
)

from squamata import pipeline
from squamata.calibrate.learn import put
from squamata.calibrate.whole import Example, choose, lsq, mean_divergence, streams, sweep
from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.load.random_model import RandomSource
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

KINDS = ["mamba1", "mamba2"]
STATIC: list[dict[str, Any]] = [
    {"site": "*.mixer.*", "spec": {"bits": 4}, "kind": "activation"},
    {"site": "*.mixer.y", "spec": "float"},
    {"site": "head.in", "spec": {"bits": 4}},
]


def student_of(kind: str, *rules: dict[str, Any], **fields: Any) -> tuple[LanguageModel, LanguageModel]:
    """A float model and the same quantized, in simulation."""
    config = config_of(kind)
    tensors = perturbed_tensors(config)
    checkpoint = quantized(config, tensors, recipe_of(*rules, **fields), [random_ids(config, 2, 20)])
    return float_model(config, tensors), LanguageModel(checkpoint, "simulate")


def examples_of(model: LanguageModel, count: int = 4, length: int = 20, seed: int = 0) -> list[Example]:
    batches = [random_ids(model.config, 1, length, seed + number) for number in range(count)]
    with use_backend("ref"):
        return [Example.of(model, ids) for ids in batches]


def leaves(student: LanguageModel) -> dict[str, torch.Tensor]:
    scaled = [site for site in student.sites() if site.scale is not None]
    return {site.name: site.scale.clone().requires_grad_() for site in scaled if site.scale is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_a_layer_at_a_time_is_the_gradient_of_the_whole(kind: str) -> None:
    reference, student = student_of(kind, *STATIC, {"site": "*.mixer.decay", "spec": {"bits": 6}})
    (example,) = examples_of(reference, 1)
    swept, plain = leaves(student), leaves(student)
    assert "head.in" in swept and "layers.0.mixer.decay" in swept
    with use_backend("ref"):
        loss = sweep(student, example, swept)
        put(student.sites(), plain)
        whole = example.divergence(student.logits(streams(student, example.ids)[-1], None))
        whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, leaf in plain.items():
        assert leaf.grad is not None
        torch.testing.assert_close(swept[name].grad, leaf.grad, rtol=1e-3, atol=1e-6 * float(leaf.grad.abs().max()))
    assert sum(float(leaf.grad.abs().sum()) > 0 for leaf in plain.values() if leaf.grad is not None) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences_where_clipping_is_all(kind: str) -> None:
    """With 16 bits rounding is nothing, and what a scale does is clip: the loss is then smooth in it."""
    clipped = {"bits": 16, "scale": {"percentile": {"alpha": 0.9}}}
    sites = ("x", "z", "dt") if kind == "mamba1" else ("x", "z", "u", "dt")
    reference, student = student_of(kind, *({"site": f"*.mixer.{site}", "spec": clipped} for site in sites))
    (example,) = examples_of(reference, 1)
    chosen = leaves(student)
    with use_backend("ref"):
        sweep(student, example, chosen)
        for name, leaf in chosen.items():
            losses = []
            for factor in (1.01, 0.99):
                moved = {other: scale.detach() for other, scale in chosen.items()}
                put(student.sites(), moved | {name: leaf.detach() * factor})
                with torch.no_grad():
                    logits = student(example.ids).double()
                    p = reference(example.ids).double().log_softmax(-1)
                    losses.append(float((p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean()))
            assert leaf.grad is not None  # both by the scale's logarithm
            assert float(leaf.grad * leaf.detach()) == pytest.approx((losses[0] - losses[1]) / 0.02, rel=0.05, abs=3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_against_the_logits_lowers_their_kl(kind: str) -> None:
    reference, student = student_of(kind, *STATIC)
    seen, unseen = examples_of(reference, 6, 24), examples_of(reference, 6, 24, seed=100)
    with use_backend("ref"):
        before = [mean_divergence(student, part) for part in (seen, unseen)]
        learned = lsq(student, seen, steps=60, learning_rate=0.03)
        after = [mean_divergence(student, part) for part in (seen, unseen)]
    assert after[0] < 0.95 * before[0] and after[1] < 0.97 * before[1]
    assert "head.in.scale" in learned and not any("state" in name for name in learned)
    _, again = student_of(kind, *STATIC)
    with use_backend("ref"):
        repeated = lsq(again, seen, steps=60, learning_rate=0.03)
    assert all(torch.equal(repeated[name], scale) for name, scale in learned.items())


def test_scales_that_became_worse_are_not_kept() -> None:
    reference, student = student_of("mamba2", *STATIC)
    start = leaves(student)
    learned = lsq(student, examples_of(reference, 2), steps=3, learning_rate=3.0)
    assert all(torch.equal(learned[f"{name}.scale"], scale) for name, scale in start.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_quantized_is_the_float_model(kind: str) -> None:
    reference, student = student_of(kind)
    examples = examples_of(reference)
    assert lsq(student, examples) == {} == choose(student, examples, {})
    with use_backend("ref"):
        assert abs(mean_divergence(student, examples)) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_by_kl_takes_what_the_logits_like_best(kind: str) -> None:
    """Against whole models quantized with every candidate alone, at the one site that is searched."""
    config, ids = config_of(kind), [random_ids(config_of(kind), 2, 20), random_ids(config_of(kind), 1, 13, 7)]
    tensors = perturbed_tensors(config)
    alphas = [0.6, 0.9, 0.97, 1.0]
    plain = float_model(config, tensors)
    costs = []
    for scale in [*({"percentile": {"alpha": alpha}} for alpha in alphas), "mse"]:
        rule = {"site": "layers.1.mixer.z", "spec": {"bits": 3, "scale": scale}}
        model = LanguageModel(quantized(config, tensors, recipe_of(rule), ids), "simulate")
        with use_backend("ref"):
            total = sum(
                float((p.exp() * (p - q.log_softmax(-1))).sum())
                for p, q in ((plain(some).log_softmax(-1), model(some)) for some in ids)
            )
        costs.append((total, model.checkpoint.site_tensors["layers.1.mixer.z.scale"]))
    searched = {"search": ["percentile", "mse"], "over": {"alpha": alphas}, "by": "kl"}
    rule = {"site": "layers.1.mixer.z", "spec": {"bits": 3, "scale": searched}}
    found = quantized(config, tensors, recipe_of(rule), ids).site_tensors
    assert torch.equal(found["layers.1.mixer.z.scale"], min(costs, key=lambda pair: pair[0])[1])


def test_searches_see_those_before_them_and_second_numbers_go_with_scales() -> None:
    config = config_of("mamba2")
    searched = {"search": ["percentile"], "over": {"alpha": [0.5, 0.9, 1.0]}, "by": "kl"}
    rules = [
        {"site": "*.mixer.u", "spec": {"bits": 4, "symmetric": False, "scale": searched}},
        {"site": "head.in", "spec": {"bits": 4, "scale": searched}},
    ]
    batches = [random_ids(config, 2, 20)]
    found = quantized(config, perturbed_tensors(config), recipe_of(*rules), batches)
    reference = float_model(config, perturbed_tensors(config))
    examples = [Example.of(reference, ids) for ids in batches]
    best = mean_divergence(LanguageModel(found, "simulate"), examples)
    for alpha in (0.5, 0.9, 1.0):
        plain = [{**rule, "spec": {**rule["spec"], "scale": {"percentile": {"alpha": alpha}}}} for rule in rules]
        uniform = quantized(config, perturbed_tensors(config), recipe_of(*plain), batches)
        assert best <= mean_divergence(LanguageModel(uniform, "simulate"), examples) + 1e-6
        assert set(uniform.site_tensors) == set(found.site_tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_trains_what_is_static_and_keeps_the_rest(kind: str) -> None:
    config = config_of(kind)
    tensors, batches = perturbed_tensors(config), [random_ids(config, 2, 20), random_ids(config, 1, 9)]
    rules = [{"site": "*.mixer.*", "spec": {"bits": 4}}, {"site": "*.mixer.y", "spec": "float"}]
    plain = quantized(config, tensors, recipe_of(*rules, transforms=["hadamard"]), batches)
    tune = {"lsq": {"steps": 12, "learning_rate": 0.02, "against": "logits"}}
    recipe = recipe_of(*rules, transforms=["hadamard"], tune=tune)
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    tuned = quantized(config, tensors, recipe, batches)
    assert set(tuned.site_tensors) == set(plain.site_tensors)
    changed = {name for name, scale in plain.site_tensors.items() if not torch.equal(scale, tuned.site_tensors[name])}
    assert changed and not any(".state." in name for name in changed)
    for name, value in plain.tensors.items():
        assert torch.equal(getattr(value, "data", value), getattr(tuned.tensors[name], "data", tuned.tensors[name]))
    examples = [Example.of(float_model(config, tensors), ids) for ids in batches]
    kls = [mean_divergence(LanguageModel(one, "simulate"), examples) for one in (plain, tuned)]
    assert kls[1] < kls[0]


def test_it_cannot_be_resumed_and_says_so(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "model", "mamba2")
    text = tmp_path / "text.txt"
    text.write_text("The snake slept in the sun. " * 40)
    recipe = recipe_of(
        *STATIC, tune={"lsq": {"steps": 2, "against": "logits"}}, calibration={"samples": 2, "length": 16}
    )
    with pytest.raises(SquamataError, match="leave --resume out"):
        pipeline.quantize(folder, recipe, tmp_path / "out", text, resume=True)
    assert not (tmp_path / "out").exists()
    pipeline.quantize(folder, recipe, tmp_path / "out", text)
    assert pipeline.load(tmp_path / "out").checkpoint.recipe == recipe


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tune": {"lsq": {"against": "logit"}}}, ["did you mean 'logits'"]),
        ({"tune": {"lsq": {"against": "logits", "step": 3}}}, ["did you mean 'steps'"]),
        (
            {"rules": [{"site": "*.state", "spec": {"bits": 8, "scale": {"search": ["mse"], "by": "kl"}}}]},
            ["last token"],
        ),
        ({"rules": [{"site": "*.D", "spec": {"bits": 8, "scale": {"search": ["mse"], "by": "kl"}}}]}, ["parameter"]),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SquamataError) as caught:
        pipeline.check(Recipe.from_mapping({"name": "test"} | fields), config_of("mamba2"))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_scale_that_is_none_is_not_learned() -> None:
    """LtSQ's levels are values: its scale stays 1."""
    reference, student = student_of("mamba2", *STATIC, {"site": "*.mixer.decay", "spec": {"bits": 4, "codec": "ltsq"}})
    learned = lsq(student, examples_of(reference, 2), steps=3)
    assert QuantSpec(bits=4, codec="ltsq").absolute and learned and not any("decay" in name for name in learned)


def test_a_second_pass_tells_its_steps() -> None:
    told: list[tuple[int, int]] = []
    config = config_of("mamba2")
    recipe = recipe_of(extends="quamba-w8a8", tune={"lsq": {"against": "logits", "steps": 3}})
    ids = random_ids(config, 2, 20)
    parts = QuantizedParts(RandomSource(config), recipe, [ids], progress=lambda *step: told.append(step))
    assert len(list(parts.each())) == parts.count
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 3), (2, 3), (3, 3)]
