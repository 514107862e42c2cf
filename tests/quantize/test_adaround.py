"""AdaRound: less error at the output than rounding to nearest, on codes next to the weight."""

from __future__ import annotations

import itertools
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.partition import Layout
from squamata.models.lm import LanguageModel
from squamata.quantize.adaround import adaround
from squamata.quantize.rtn import round_to_nearest
from squamata.spec.quant import QuantSpec

GRANULARITIES = ["tensor", "channel", "segment", "group(16)"]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    """A weight (N, K) and correlated inputs (1000, K)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(1000, columns, generator=generator) @ (mixing + 0.3 * torch.ones(columns, 1))
    return weight, inputs, Layout(("out", "in"), (rows, columns), (rows // 2, rows - rows // 2), flat=False)


def moments(inputs: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(gram=inputs.double().T @ inputs.double(), count=len(inputs))


def output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Squared error of every row's outputs (N,)."""
    return ((rounded - weight).double() @ inputs.double().T).square().sum(1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (4, True), (4, False), (8, True)])
def test_correlated_inputs_are_rounded_for(granularity: str, bits: int, symmetric: bool) -> None:
    weight, inputs, layout = problem(12, 48)
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity)
    nearest = round_to_nearest(weight, spec, layout)
    learned = adaround(weight, spec, layout, moments(inputs), steps=400)
    assert torch.equal(learned.scale, nearest.scale) and learned.data.dtype == nearest.data.dtype
    assert learned.length == nearest.length and learned.shape == nearest.shape
    before = output_error(weight, nearest.dequantize(), inputs)
    after = output_error(weight, learned.dequantize(), inputs)
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.5 * float(before.sum())
    steps = (learned.dequantize() - weight).abs() / learned.element_scale()
    limits = QuantSpec(bits=bits, symmetric=symmetric).code_range
    assert int(learned.codes().abs().max()) <= limits[1] - limits[0]
    assert float(steps.max()) < 1.5  # a neighbour of the weight; clipped codes lie half a step further


def test_independent_inputs_are_rounded_to_nearest() -> None:
    """With X X^T = I the elements are independent, and the nearest code is the best."""
    weight, _, layout = problem(5, 20)
    spec = QuantSpec(bits=4, granularity="channel")
    learned = adaround(weight, spec, layout, SimpleNamespace(gram=torch.eye(20), count=1), steps=300)
    assert torch.equal(learned.dequantize(), round_to_nearest(weight, spec, layout).dequantize())


def test_no_rounding_is_better_than_the_best_of_all_which_it_often_finds() -> None:
    """Ten weights a row: all 1024 roundings are tried. The relaxation ends in a local optimum now and then."""
    weight, inputs, layout = problem(6, 10, seed=4)
    spec = QuantSpec(bits=3, granularity="channel")
    nearest = round_to_nearest(weight, spec, layout)
    scale, best = nearest.element_scale(), torch.full((6,), torch.inf, dtype=torch.float64)
    for ups in itertools.product((0, 1), repeat=10):
        codes = ((weight / scale).floor() + torch.tensor(ups)).clamp(*spec.code_range)
        best = torch.minimum(best, output_error(weight, codes * scale, inputs))
    learned = output_error(weight, adaround(weight, spec, layout, moments(inputs)).dequantize(), inputs)
    before = output_error(weight, nearest.dequantize(), inputs)
    assert bool((learned >= best * (1 - 1e-5)).all())
    assert int((learned <= best * (1 + 1e-5)).sum()) >= 4 > int((before <= best * (1 + 1e-5)).sum())


def test_blocks_of_rows_change_nothing_and_runs_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, layout = problem(7, 24)
    spec = QuantSpec(bits=4, granularity="group(16)")
    whole = adaround(weight, spec, layout, moments(inputs), steps=50)
    again = adaround(weight, spec, layout, moments(inputs), steps=50)
    assert torch.equal(whole.data, again.data)
    monkeypatch.setattr(import_module("squamata.quantize.adaround"), "AT_ONCE", 48)
    parts = adaround(weight, spec, layout, moments(inputs), steps=50)
    assert (parts.codes() != whole.codes()).float().mean() < 0.02  # sums in another order


@pytest.mark.parametrize("statistics", [None, SimpleNamespace(gram=torch.zeros(20, 20), count=0)])
def test_it_says_that_it_needs_a_text(statistics: SimpleNamespace | None) -> None:
    weight, _, layout = problem(4, 20)
    with pytest.raises(SquamataError, match="--calibration"):
        adaround(weight, QuantSpec(bits=4), layout, statistics)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_model_rounded_so_is_nearer_to_its_float_self(kind: str) -> None:
    """Through the pipeline, 3-bit projections, on the text that it was calibrated with; an embedding beside them."""
    config = config_of(kind)
    tensors, ids = perturbed_tensors(config), random_ids(config, 4, 32)
    rules = [
        {"site": f"*.{name}.weight", "spec": {"bits": 3, "granularity": "channel"}} for name in ("in_proj", "out_proj")
    ]
    rules += [{"site": "embedding.weight", "spec": {"bits": 8, "granularity": "channel"}}]
    logits = float_model(config, tensors)(ids)
    errors = {}
    for quantizer in ("rtn", {"adaround": {"steps": 300}}):
        checkpoint = quantized(config, tensors, recipe_of(*rules, weights=quantizer), [ids])
        model = LanguageModel(checkpoint, "integer")
        errors[str(quantizer)] = float((model(ids) - logits).square().mean())
    rounded, learned = errors.values()
    assert learned < 0.8 * rounded
