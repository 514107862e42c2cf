"""AWQ: float64 logits stay without clipping, the searches find what brute force finds, and rounding loses less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import MemorySource, Tensors, config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.qtensor import as_float
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts
from squamata.spec.granularity import Granularity
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe
from squamata.transform import check
from squamata.transform.awq import best_factors, clipped, output_error, rounded

INT4 = {"bits": 4, "granularity": "group(16)"}
SPEC = QuantSpec(bits=4, granularity=Granularity.parse("group(16)"))


def transformed(config: ModelConfig, tensors: Tensors, transforms: list[Any], ids: torch.Tensor) -> Checkpoint:
    parts = QuantizedParts(MemorySource(config, tensors), recipe_of(transforms=transforms), [ids])
    merged = {name: value for part in parts.each() for name, value in part.items()}
    return Checkpoint(parts.config, merged, recipe_of(transforms=transforms))


def outlying(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (24, 48), and inputs (500, 48) of which two channels are thirty times the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 48, generator=generator) * (0.5 + torch.rand(48, generator=generator))
    x[:, [3, 20]] *= 30
    return torch.randn(24, 48, generator=generator), x


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_without_clipping_the_logits_stay(kind: str) -> None:
    config = config_of(kind, projection_bias=True)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    tensors["layers.0.norm.weight"][3] *= 20
    ids = random_ids(config, 2, 19)
    changed = transformed(config, tensors, [{"awq": {"spec": INT4, "clip": False}}], ids)
    assert not torch.equal(changed.tensors["layers.0.norm.weight"], tensors["layers.0.norm.weight"])  # type: ignore[arg-type]
    before = float_model(config, tensors, torch.float64)(ids)
    after = LanguageModel(changed, "float", torch.float64)(ids)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9


def test_the_error_is_that_of_the_outputs() -> None:
    weight, x = outlying()
    change = rounded(weight, SPEC) - weight
    expected = (x @ change.T).double().square().mean(0)
    torch.testing.assert_close(output_error(change, x.T.double() @ x.double() / len(x)), expected, rtol=1e-4, atol=0)


def test_rounded_is_what_rounding_to_nearest_stores() -> None:
    weight, _ = outlying()
    for group in weight.split(16, dim=1):
        scale = group.abs().amax(1, keepdim=True) / 7
        expected = (group / scale).round().clamp(-7, 7) * scale
        torch.testing.assert_close(rounded(group.contiguous(), SPEC), expected)
    assert torch.equal(rounded(weight, SPEC)[:, 16:32], rounded(weight[:, 16:32].contiguous(), SPEC))


def test_the_factors_are_the_best_of_twenty_by_brute_force() -> None:
    weight, x = outlying()
    average, errors, tried = x.abs().mean(0), [], []
    for step in range(20):
        factors = average ** (step / 20)
        factors = factors / (factors.max() * factors.min()).sqrt()
        tried.append(factors)
        output = (x / factors) @ rounded(weight * factors, SPEC).T
        errors.append(float((output - x @ weight.T).square().mean()))
    moments = x.T.double() @ x.double() / len(x)
    found = best_factors(weight, average.double(), moments, SPEC, 20)
    torch.testing.assert_close(found.float(), tried[errors.index(min(errors))], rtol=1e-5, atol=0)
    assert errors.index(min(errors)) > 0 and min(errors) < 0.5 * errors[0]


def test_clipping_never_costs_a_group_and_helps_some() -> None:
    weight, x = outlying()
    moments = x.T.double() @ x.double() / len(x)
    cut = clipped(weight, moments, SPEC)
    for group in range(3):
        inside = slice(16 * group, 16 * group + 16)
        own = x[:, inside]
        errors = [
            (own @ (rounded(one, SPEC)[:, inside] - weight[:, inside]).T).square().mean(0) for one in (weight, cut)
        ]
        assert bool((errors[1] <= errors[0] * (1 + 1e-4) + 1e-9).all())
        assert float(errors[1].sum()) < 0.95 * float(errors[0].sum())
    assert bool((cut.abs() <= weight.abs()).all()) and bool((cut.sign() == weight.sign()).all())
    ratio = cut.abs().unflatten(1, (3, 16)).amax(-1) / weight.abs().unflatten(1, (3, 16)).amax(-1)
    assert float(ratio.min()) >= 0.55 - 1e-6


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_what_it_is_for(kind: str) -> None:
    """Two channels of the norms fifty times the others: 4-bit weights lose less than rounded to nearest."""
    config = config_of(kind)
    tensors = perturbed_tensors(config)
    for layer in range(2):
        tensors[f"layers.{layer}.norm.weight"][[3, 9]] *= 50
    ids = random_ids(config, 4, 40)
    plain = float_model(config, tensors)(ids)
    errors = []
    for transforms in ([], [{"awq": {"spec": INT4}}]):
        recipe = recipe_of({"site": "*.in_proj.weight", "spec": INT4}, transforms=transforms)
        logits = LanguageModel(quantized(config, tensors, recipe, [ids]), "simulate")(ids)
        errors.append(float((logits - plain).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_the_shipped_recipe_searches_for_the_spec_that_it_rounds_to() -> None:
    recipe = Recipe.read("awq-w4a16")
    specs = recipe.resolve(("mamba1", "mamba2"))
    searched = QuantSpec.model_validate(recipe.transforms[0].parameters["spec"])
    found = [spec for name, spec in specs.items() if name.endswith("proj.weight")]
    assert len(found) == 5 and all(spec == searched for spec in found)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"bits": 4, "codec": "table", "granularity": "channel"}, "leave 'codec'"),
        ({"bits": 8, "dynamic": True, "granularity": "channel"}, "leave 'codec', 'dynamic'"),
        ({"bits": 8, "granularity": "segment"}, "no scales per segment: use tensor"),
        ({"bits": 4, "granularity": "group(16)", "keep": {"channels": 16}}, "leave 'keep' out"),
        ({"bits": 4, "scale": "minmx"}, "did you mean 'minmax'"),
    ],
)
def test_a_spec_that_its_search_cannot_round_to_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(SquamataError, match=f"^transform awq: spec: .*{said}"):
        check(recipe_of(transforms=[{"awq": {"spec": spec}}]))


def test_of_two_levels_of_scales_it_searches_with_the_first() -> None:
    config, batches = config_of("mamba2"), [random_ids(config_of("mamba2"), 2, 20)]
    one = {"bits": 4, "granularity": "group(16)", "full_range": True}
    rule = {"site": "*.in_proj.weight", "spec": one | {"second_level": True}}
    found = [
        quantized(config, perturbed_tensors(config), recipe_of(rule, transforms=[{"awq": {"spec": spec}}]), batches)
        for spec in (one, one | {"second_level": True})
    ]
    name = "layers.1.mixer.in_proj.weight"
    assert torch.equal(as_float(found[0].tensors[name]), as_float(found[1].tensors[name]))
