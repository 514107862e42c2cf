"""GPTQ: the greedy algorithm against a plain one that solves for every column anew, and what it is for."""

from __future__ import annotations

import pytest
import torch
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.grid import Grid
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, as_float
from squamata.kernels.site import encode
from squamata.models.lm import LanguageModel
from squamata.quantize.gptq import gptq, inverse_factor
from squamata.quantize.rtn import find_scales, round_to_nearest
from squamata.scales.gram import Gram
from squamata.spec.quant import QuantSpec

ROWS, COLUMNS = 12, 70
LAYOUT = Layout(("out", "in"), (ROWS, COLUMNS), (5, 7), flat=False)


def problem(seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor, Gram]:
    """Weights, correlated inputs with an outlier channel, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = torch.randn(tokens, COLUMNS, generator=generator) @ mix
    inputs[:, 7] *= 20
    gram = Gram(COLUMNS)
    gram.update(inputs[: tokens // 2].reshape(2, -1, COLUMNS))
    gram.update(inputs[tokens // 2 :])
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs, gram


def loss(weight: Tensor, quantized: QTensor, inputs: Tensor) -> float:
    return float(((quantized.dequantize() - weight) @ inputs.T).square().sum())


def plain_gptq(weight: Tensor, gram: Gram, spec: QuantSpec, damping: float) -> Tensor:
    """Codes by the definition (paper, eq. 2): the least-squares update of what is left of a row, solved anew."""
    H = gram.gram + torch.eye(COLUMNS, dtype=torch.float64) * damping * gram.gram.diagonal().mean()
    scale = find_scales(weight, spec, LAYOUT)[0].double()[:, None].expand(ROWS, 1)
    work, codes = weight.double().clone(), torch.zeros(ROWS, COLUMNS)
    for column in range(COLUMNS):
        inverse = torch.linalg.inv(H[column:, column:])
        rounded = encode(work[:, column].float(), Grid.of(scale[:, 0].float()), spec)
        codes[:, column] = rounded.data.float()
        error = (work[:, column] - rounded.dequantize().double()) / inverse[0, 0]
        work[:, column:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("block", [1, 16, 128])
def test_the_blocked_form_is_the_algorithm(block: int) -> None:
    weight, _, gram = problem()
    spec = QuantSpec.model_validate({"bits": 8, "granularity": "channel"})
    found = gptq(weight, spec, LAYOUT, gram, block=block)
    expected = plain_gptq(weight, gram, spec, 0.01)
    differing = (found.codes().float() - expected).abs()
    assert differing.max() <= 1 and (differing > 0).float().mean() < 0.01  # float32 updates meet ties


@pytest.mark.parametrize("granularity", ["tensor", "channel", "segment", "group(16)", "group(32)", "group(128)"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_error_of_the_product_falls(granularity: str, bits: int, symmetric: bool, act_order: bool) -> None:
    weight, inputs, gram = problem()
    spec = QuantSpec.model_validate({"bits": bits, "granularity": granularity, "symmetric": symmetric})
    nearest = loss(weight, round_to_nearest(weight, spec, LAYOUT), inputs)
    assert loss(weight, gptq(weight, spec, LAYOUT, gram, act_order=act_order), inputs) < 0.9 * nearest


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    """With a diagonal Gram matrix there is nothing to make up for."""
    weight, _, _ = problem()
    gram = Gram(COLUMNS)
    gram.update(torch.diag(torch.linspace(1, 9, COLUMNS)))
    spec = QuantSpec.model_validate({"bits": 4, "granularity": "group(16)"})
    found, nearest = gptq(weight, spec, LAYOUT, gram), round_to_nearest(weight, spec, LAYOUT)
    assert torch.equal(found.data, nearest.data) and torch.equal(found.scale, nearest.scale)


def test_an_input_that_is_never_there_changes_nothing() -> None:
    weight, inputs, _ = problem()
    inputs[:, 20:30] = 0
    gram = Gram(COLUMNS)
    gram.update(inputs)
    spec = QuantSpec.model_validate({"bits": 4, "granularity": "channel"})
    found = gptq(weight, spec, LAYOUT, gram)
    assert torch.equal(found.codes()[:, 20:30], round_to_nearest(weight, spec, LAYOUT).codes()[:, 20:30])


def test_the_factor_is_that_of_the_inverse() -> None:
    _, _, gram = problem()
    upper = inverse_factor(gram.gram, 0.01)
    damped = gram.gram + torch.eye(COLUMNS, dtype=torch.float64) * 0.01 * gram.gram.diagonal().mean()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(COLUMNS, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(upper, upper.triu())


def test_the_gram_matrix_is_exact() -> None:
    _, inputs, gram = problem()
    torch.testing.assert_close(gram.gram, inputs.double().T @ inputs.double(), rtol=1e-5, atol=1e-3)
    assert gram.count == 400


def test_it_is_deterministic_and_refuses_to_guess() -> None:
    weight, _, gram = problem()
    spec = QuantSpec.model_validate({"bits": 4, "granularity": "group(32)"})
    assert torch.equal(gptq(weight, spec, LAYOUT, gram).data, gptq(weight, spec, LAYOUT, gram).data)
    with pytest.raises(SquamataError, match="give a text with --calibration"):
        gptq(weight, spec, LAYOUT, None)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_through_the_pipeline_layer_by_layer(kind: str) -> None:
    """Every projection and the head see their inputs, after quantized predecessors; the rest is rounded to nearest."""
    config = config_of(kind, tie_embeddings=False, **({"dt_rank": 16} if kind == "mamba1" else {}))
    tensors, ids = perturbed_tensors(config), [random_ids(config, 4, 60, seed) for seed in range(3)]
    rules = [{"site": f"*{name}.weight", "spec": {"bits": 3, "granularity": "channel"}} for name in ("proj", "head")]
    rules.append({"site": "embedding.weight", "spec": {"bits": 8}})
    plain = float_model(config, tensors)(ids[0])
    errors, made = [], {}
    for weights in ("rtn", "gptq"):
        checkpoint = quantized(config, tensors, recipe_of(*rules, weights=weights), ids)
        made[weights] = checkpoint.tensors
        logits = LanguageModel(checkpoint, "float")(ids[0])
        errors.append(float((logits - plain).norm() / plain.norm()))
    assert errors[1] < 0.95 * errors[0]
    products = [name for name in made["gptq"] if name.endswith(("proj.weight", "head.weight"))]
    assert len(products) == 2 * (4 if kind == "mamba1" else 2) + 1
    for name, value in made["gptq"].items():
        same = torch.equal(as_float(value), as_float(made["rtn"][name]))
        assert same == (name not in products), name


def test_kept_columns_make_up_for_all_others() -> None:
    """Against Atom's loop in float64: groups of 16 found in turn, no further than what is kept."""
    weight, inputs, gram = problem()
    spec = QuantSpec.model_validate(
        {"bits": 4, "full_range": True, "granularity": "group(16)", "clip": 0.85, "keep": {"channels": 18}}
    )
    work, rest = weight.double().clone(), COLUMNS - 18
    H = gram.gram + torch.eye(COLUMNS, dtype=torch.float64) * 0.01 * gram.gram.diagonal().mean()
    inverse = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    expected = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for column in range(rest):
        if column % 16 == 0:
            scale = 0.85 * work[:, column : min(column + 16, rest)].abs().amax(1) / 7.5
        expected[:, column] = (work[:, column] / scale).round().clamp(-8, 7) * scale
        error = (work[:, column] - expected[:, column]) / inverse[column, column]
        work[:, column:] -= error[:, None] * inverse[column, column:]
    step = work[:, rest:].abs().amax(1, keepdim=True) / 127
    expected[:, rest:] = (work[:, rest:] / step).round() * step
    found = gptq(weight, spec, LAYOUT, gram)
    differing = (found.dequantize() - expected).abs() > 1e-3
    assert differing.float().mean() < 0.02  # float32 updates meet ties
    assert loss(weight, found, inputs) < 0.5 * loss(weight, round_to_nearest(weight, spec, LAYOUT), inputs)
    assert loss(weight, gptq(weight, spec, LAYOUT, gram, act_order=True), inputs) < loss(
        weight, round_to_nearest(weight, spec, LAYOUT), inputs
    )
