"""The GPU's decode step against the reference, in Triton's interpreter: every number on the CPU, no GPU needed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.kernels.gpu import gemv as gpu_products
from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import (
    INTERPRETED,
    Convolution,
    Landing,
    Shape,
    choose_shape,
    gemv,
    gemv_pair,
    product,
)
from squamata.kernels.gpu.norm import RowSite, plan_rotation, rotate
from squamata.kernels.gpu.tiles import Format, tile_linear
from squamata.kernels.gpu.vocabulary import greedy, greedy_scratch
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.matrices import FAMILIES, Family
from squamata.kernels.hadamard.ref import rotate as rotate_reference
from squamata.kernels.linear import Linear
from squamata.kernels.packing import pack_int4
from squamata.kernels.qtensor import QTensor
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

DEVICE = "cpu" if INTERPRETED else "cuda"


def small(kind: str) -> ModelConfig:
    """Widths that the packed formats take: multiples of 32, and a dt_rank of one quad."""
    return config_of(kind, d_model=64, d_inner=128, **({"dt_rank": 16} if kind == "mamba1" else {"head_dim": 32}))


def random_weight(rows: int, columns: int, bits: int, group: int | None) -> QTensor:
    spec = QuantSpec(bits=bits, full_range=bits == 4, granularity=f"group({group})" if group else "channel")
    low, high = spec.code_range
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows, columns // group if group else 1) * 0.01 + 0.001
    return QTensor(pack_int4(codes) if bits == 4 else codes, scale, spec, None, columns if bits == 4 else None)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("format", "bits", "group"),
    [
        (Format.INT8_INT8, 8, None),
        (Format.INT4_INT8, 4, 64),
        (Format.INT4_INT8, 4, None),
        (Format.INT4_FLOAT, 4, 32),
        (Format.INT8_FLOAT, 8, None),
        (Format.FLOAT32_FLOAT, 0, None),
        (Format.BFLOAT16_FLOAT, 0, None),
    ],
)
def test_product_agrees_with_the_exact_one(format: Format, bits: int, group: int | None, rows: int) -> None:
    torch.manual_seed(rows)
    outputs, columns = 37, 192
    weight: Any = random_weight(outputs, columns, bits, group) if bits else torch.randn(outputs, columns)
    if format == Format.BFLOAT16_FLOAT:
        weight = weight.bfloat16().float()
    layer = Linear(weight, torch.randn(outputs))
    shape = choose_shape(outputs, columns, format)
    tiled = tile_linear(layer, format, shape.tile_rows, DEVICE)
    integer = format.integer_activations
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8) if integer else torch.randn(rows, columns)
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    made = product(x.to(DEVICE), None, tiled, tiled.factor, None, (None, out), None, shape)
    gemv(made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    values = weight.dequantize(torch.float64) if isinstance(weight, QTensor) else weight.double()
    exact = x.double() @ values.T + layer.bias.double()
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_product_in_rounds_agrees_with_the_exact_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quads asked for two at a time: those of the next round while these are used."""
    monkeypatch.setattr(gpu_products, "MOST_QUADS", 2)
    weight = torch.randn(24, 96)
    tiled = tile_linear(Linear(weight), Format.FLOAT32_FLOAT, 8, DEVICE)
    x, out = torch.randn(rows, 96), torch.full((rows, 24), float("nan"), device=DEVICE)
    made = product(x.to(DEVICE), None, tiled, tiled.factor, None, (None, out), None, Shape(8, 4))
    assert made.cut.rounds == 3
    gemv(made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    assert torch.allclose(out.cpu(), x @ weight.T, atol=1e-4)


def in_halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, K) in 16 bits as two int8 rows side by side, the scale of a row as products take it, and its values."""
    scale = x.abs().amax(1, keepdim=True) / 32512
    codes = (x / scale).round()
    upper = ((codes + 128) / 256).floor()
    return torch.cat([upper, codes - 256 * upper], 1).to(torch.int8), (scale / 16).reshape(-1), codes * scale


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("group", [32, None])
def test_product_of_4_by_16_bits_agrees_with_the_exact_one(group: int | None, rows: int) -> None:
    torch.manual_seed(rows)
    outputs, columns = 37, 192
    weight = random_weight(outputs, columns, 4, group)
    shape = choose_shape(outputs, columns, Format.INT4_INT16)
    tiled = tile_linear(Linear(weight), Format.INT4_INT16, shape.tile_rows, DEVICE)
    x, scale, values = in_halves(torch.randn(rows, columns))
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    made = product(x.to(DEVICE), scale.to(DEVICE), tiled, tiled.factor, None, (None, out), None, shape)
    gemv(made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    exact = values.double() @ weight.dequantize(torch.float64).T
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("groups", [1, 4])
def test_gate_norm_in_16_bits(groups: int) -> None:
    """Codes that stand for the norm to half a step of the row's scale, and int8 that stay int8."""
    torch.manual_seed(groups)
    y, gain = torch.randn(2, 96), torch.rand(96) + 0.5
    out = torch.full((2, 192), 99, dtype=torch.int8, device=DEVICE)
    scale = torch.full((2,), float("nan"), device=DEVICE)
    plan = plan_rotation(None, 96, DEVICE)
    rotate(y.to(DEVICE), None, gain.to(DEVICE), 1e-5, groups, plan, RowSite(), RowSite(), out, scale, pdl=False)
    grouped = y.double().unflatten(1, (groups, -1))
    exact = (grouped * (grouped.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(1) * gain
    upper, lower = out.cpu().double().chunk(2, 1)
    step = 16 * scale.cpu().double()[:, None]
    assert torch.allclose(step[:, 0] * 32512, exact.abs().amax(1), rtol=1e-6)
    assert ((256 * upper + lower) * step - exact).abs().max() <= 0.51 * float(step.max())


def conv_plan(channels: int, split: int) -> ConvolutionPlan:
    """Random taps and grids: u half to even, the rest away from zero; one channel in four stays float."""
    inverse = 50 * torch.rand(channels) + 10
    inverse[::4] = 0
    scale = 1 / inverse.clamp(min=1)
    bounds = torch.full_like(inverse, 127.0)
    rows = (0.01 * torch.rand(channels) + 0.01, torch.randn(channels), inverse, scale, -bounds, bounds)
    return ConvolutionPlan(torch.randn(4, channels).to(DEVICE), *(row.to(DEVICE) for row in rows), 0, 1, split=split)


def convolved(plan: ConvolutionPlan, slots: torch.Tensor, newest: int) -> torch.Tensor:
    """What the convolution leaves, in float64, of a ring (K, B, C)."""
    order = [(newest + 1 + k) % len(slots) for k in range(len(slots))]
    taps, factor, bias, inverse, scale, low, high = (part.cpu().double() for part in plan.tables)
    x = torch.nn.functional.silu((slots[order].double() * taps[:, None]).sum(0) * factor + bias)
    scaled = (x * inverse).clamp(low, high)
    away = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
    landed = torch.where(torch.arange(x.shape[1]) < plan.split, scaled.round(), away) * scale
    return torch.where(inverse == 0, x, landed)


def test_rows_land_on_their_own_grids_and_go_through_the_ring() -> None:
    torch.manual_seed(0)
    outputs, columns, ring, rows = 40, 64, (8, 24), 2
    layer = Linear(random_weight(outputs, columns, 8, None))
    shape = choose_shape(outputs, columns, Format.INT8_INT8)
    tiled = tile_linear(layer, Format.INT8_INT8, shape.tile_rows, DEVICE)
    inverse = torch.rand(len(tiled.factor), device=DEVICE) + 0.5
    inverse[32:] = 0  # stays float
    bounds = torch.full_like(inverse, 127.0)
    landing = Landing(inverse, -bounds, bounds, 1, *ring)
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    codes = torch.full((rows, outputs), 99, dtype=torch.int8, device=DEVICE)
    values = torch.full((rows, outputs), float("nan"), device=DEVICE)
    slots = torch.randint(-127, 128, (4, rows, 16), dtype=torch.int8, device=DEVICE)
    before, mixed = slots.cpu().clone(), torch.full((rows, 16), float("nan"), device=DEVICE)
    through = Convolution(conv_plan(16, 10), slots, mixed)
    made = product(x.to(DEVICE), None, tiled, tiled.factor, landing, (codes, values), through, shape)
    gemv(made, torch.tensor([7], dtype=torch.int32, device=DEVICE), pdl=False)
    y = (x.float() @ layer.weight.codes().float().T) * layer.weight.scale.reshape(-1)
    scaled = y * inverse[:outputs].cpu()
    landed = torch.copysign(torch.floor(scaled.abs() + 0.5), scaled).clamp(-127, 127)
    assert torch.equal(codes.cpu()[:, :8].float(), landed[:, :8])
    assert torch.equal(slots.cpu()[3].float(), landed[:, 8:24]) and torch.equal(slots.cpu()[:3], before[:3])
    assert torch.allclose(mixed.cpu().double(), convolved(through.plan, slots.cpu(), 3), rtol=1e-5, atol=1e-6)
    assert torch.equal(codes.cpu()[:, 24:32].float(), landed[:, 24:32])
    assert torch.allclose(values.cpu()[:, 32:], y[:, 32:], rtol=1e-6)
    assert (codes.cpu()[:, 8:24] == 99).all() and values.cpu()[:, :32].isnan().all()


@pytest.mark.parametrize("landed", [False, True])
def test_a_pair_of_products_of_which_one_gates(landed: bool) -> None:
    """Different inputs and formats; the second leaves SiLU of what its site represents."""
    torch.manual_seed(1)
    first, second = torch.randn(24, 64), Linear(random_weight(40, 128, 8, None))
    formats = (Format.FLOAT32_FLOAT, Format.INT8_INT8)
    shapes = choose_shape(24, 64, formats[0]), choose_shape(40, 128, formats[1])
    tiled = [tile_linear(part, format, shape.tile_rows, DEVICE)
             for part, format, shape in zip((Linear(first), second), formats, shapes, strict=True)]  # fmt: skip
    x, codes = torch.randn(3, 64), torch.randint(-127, 128, (3, 128), dtype=torch.int8)
    out, gate = (torch.full((3, size), float("nan"), device=DEVICE) for size in (24, 40))
    inverse = torch.full((40,), 20.0 if landed else 0.0, device=DEVICE)
    bounds = torch.full_like(inverse, 127.0)
    landing = Landing(inverse, -bounds, bounds, any_codes=landed, scale=torch.full_like(inverse, 0.05))
    made = (
        product(x.to(DEVICE), None, tiled[0], tiled[0].factor, None, (None, out), None, shapes[0]),
        product(codes.to(DEVICE), None, tiled[1], tiled[1].factor, landing, (None, gate), None, shapes[1], gate=True),
    )
    gemv_pair(*made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    y = codes.double() @ second.weight.dequantize(torch.float64).T
    represented = (20 * y).round().clamp(-127, 127) / 20 if landed else y
    assert torch.allclose(out.cpu(), x @ first.T, atol=1e-4)
    assert torch.allclose(gate.cpu().double(), torch.nn.functional.silu(represented), atol=1e-5)


@pytest.mark.parametrize("start", [0, 16])
def test_a_part_of_a_product_gives_these_rows(start: int) -> None:
    torch.manual_seed(start)
    weight, x = random_weight(40, 64, 4, 32), torch.randint(-127, 128, (1, 64), dtype=torch.int8)
    linear = tile_linear(Linear(weight, torch.randn(40)), Format.INT4_INT8, 16, DEVICE)
    part = linear.part(start, start + 16)
    out = torch.full((1, 16), float("nan"), device=DEVICE)
    made = product(x.to(DEVICE), None, part, part.factor, None, (None, out), None, Shape(16, 2))
    gemv(made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    exact = x.double() @ weight.dequantize(torch.float64).T + linear.bias[:40].cpu().double()
    assert torch.allclose(out.cpu().double(), exact[:, start : start + 16], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [8, 64, 96, 512, 640])
def test_rotation_agrees_with_the_butterflies(size: int, family: Family) -> None:
    y = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    rotation = Rotation(size, size, family)
    out = torch.full((2, size), float("nan"), device=DEVICE)
    plan = plan_rotation(rotation, size, DEVICE)
    rotate(y.to(DEVICE), None, None, 0.0, 1, plan, RowSite(), RowSite(), out, torch.ones(2, device=DEVICE), pdl=False)
    assert torch.allclose(out.cpu(), rotate_reference(y, rotation), atol=1e-5)


INT4 = {"bits": 4, "granularity": "group(32)", "full_range": True, "scale_dtype": "float16"}
CASES = {
    "float": [],
    "w4a16": [{"site": "*.in_proj.weight", "spec": INT4}, {"site": "*.out_proj.weight", "spec": INT4}],
    "w8a8": "quamba-w8a8",
    "static state": "quamba-w8a8-static-state",
    "w4a8": "w4a8",
}


def recipe(case: str) -> Recipe:
    rules = CASES[case]
    if case == "w4a8":  # the recipe, in groups that fit a tiny model
        found = Recipe.read("w4a8").to_mapping()
        for rule in found["rules"]:
            if isinstance(rule["spec"], dict) and "group" in str(rule["spec"].get("granularity", "")):
                rule["spec"]["granularity"] = "group(32)"
        return Recipe.from_mapping(found)
    return Recipe.read(rules) if isinstance(rules, str) else recipe_of(*rules)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("case", CASES)
def test_step_agrees_with_the_reference(kind: str, case: str) -> None:
    config = small(kind)
    tensors = perturbed_tensors(config)
    checkpoint = quantized(config, tensors, recipe(case), [random_ids(config, 2, 24)])
    model = LanguageModel(checkpoint)
    ids = random_ids(config, 2, 8, seed=1)
    with use_backend("ref"), torch.no_grad():
        cache = model.new_cache(2)
        model.forward(ids[:, :5], cache)
        decoder = CapturedDecoder(model, 2, DEVICE, weights="float32", pdl=False)
        decoder.load_cache(cache)
        for token in range(5, 8):
            wanted = model.step(ids[:, token], cache)
            got = decoder.step(ids[:, token].to(DEVICE)).cpu()
            tolerance = 1e-5 if case in ("float", "w4a16") else 2e-2  # a code that flips at a tie goes on
            assert float((got - wanted).norm() / wanted.norm()) < tolerance
            assert torch.equal(decoder.ids.cpu(), got.argmax(-1))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_fast_step_with_4_bit_weights_agrees_with_the_exact_one(kind: str) -> None:
    """Activations in 16 bits and bfloat16 for the weights that the recipe leaves in float: as far apart as bfloat16."""
    config = small(kind)
    model = LanguageModel(quantized(config, perturbed_tensors(config), recipe("w4a16"), []))
    fast, exact = (CapturedDecoder(model, 2, DEVICE, weights=name, pdl=False) for name in ("bfloat16", "float32"))
    assert fast.plan.layers[0].entry.projection.linear.format == Format.INT4_INT16
    ids = random_ids(config, 2, 4, seed=1).to(DEVICE)
    for token in range(4):
        wanted, got = exact.step(ids[:, token]), fast.step(ids[:, token])
        assert float((got - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.skipif(INTERPRETED, reason="the interpreter refuses a maximum of what is not a number")
def test_logits_that_are_not_numbers_leave_ids_inside_the_vocabulary() -> None:
    logits = torch.full((2, 1100), float("nan"), device=DEVICE)
    ids = torch.full((2,), -1, dtype=torch.int64, device=DEVICE)
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    greedy(logits, greedy_scratch(2, 1100, DEVICE), ids, position, pdl=False)
    assert bool(((ids >= 0) & (ids < 1100)).all())


def test_a_recipe_that_the_kernels_do_not_take_is_refused_in_one_line() -> None:
    config = small("mamba2")
    dynamic = recipe_of({"site": "*.mixer.z", "spec": {"bits": 8, "dynamic": True, "granularity": "token"}})
    model = LanguageModel(quantized(config, perturbed_tensors(config), dynamic, []))
    with pytest.raises(SquamataError, match="static scale"):
        CapturedDecoder(model, 1, DEVICE, pdl=False)


def test_sites_that_the_kernels_would_pass_over_are_refused() -> None:
    config = small("mamba2")
    checkpoint = quantized(config, perturbed_tensors(config), recipe("w8a8"), [random_ids(config, 2, 24)])
    with pytest.raises(SquamataError, match="simulated"):
        CapturedDecoder(LanguageModel(checkpoint, "simulate"), 1, DEVICE, pdl=False)
    model = LanguageModel(checkpoint)
    next(model.sites()).observer = lambda tensor: None
    with pytest.raises(SquamataError, match="observed"):
        CapturedDecoder(model, 1, DEVICE, pdl=False)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_state_is_rounded_stochastically_to_its_neighbours(kind: str, tokens: int) -> None:
    """By a step and by a prompt, against the float state of the same first tokens."""
    config = small(kind)
    tensors, spec = perturbed_tensors(config), {"bits": 8, "granularity": "channel", "dynamic": True}
    rounded = recipe_of({"site": "*.mixer.state", "spec": spec | {"rounding": "stochastic"}})
    ids = random_ids(config, 2, tokens, seed=1).to(DEVICE)
    states = []
    for chosen in (Recipe.read("float"), rounded):
        model = LanguageModel(quantized(config, tensors, chosen, []))
        decoder = CapturedDecoder(model, 2, DEVICE, weights="float32", pdl=False)
        decoder.step(ids[:, 0]) if tokens == 1 else decoder.prefill(ids)
        states.append(decoder.plan.layers[0].state.state.cpu().double())
    scaled = states[0] / (states[0].abs().amax(-1, keepdim=True) / 127)
    error = states[1] - scaled
    assert float(error.abs().max()) < 1.001
    assert abs(float(error.mean())) < 5 * 0.41 / error.numel() ** 0.5  # of a fraction that is uniform
    assert 0.15 < float((error.abs() > 0.5).double().mean()) < 0.35  # to nearest: none
