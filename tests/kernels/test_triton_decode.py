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
from squamata.kernels.gpu_gemv import INTERPRETED, Landing, choose_shape, gemv
from squamata.kernels.gpu_norm import RowSite, greedy, greedy_scratch, plan_rotation, rotate
from squamata.kernels.gpu_tiles import Format, tile_linear
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
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gemv(x.to(DEVICE), None, tiled, tiled.factor, None, None, out, None, position, shape, pdl=False)
    values = weight.dequantize(torch.float64) if isinstance(weight, QTensor) else weight.double()
    exact = x.double() @ values.T + layer.bias.double()
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


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
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gemv(x.to(DEVICE), scale.to(DEVICE), tiled, tiled.factor, None, None, out, None, position, shape, pdl=False)
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
    rotate(y.to(DEVICE), gain.to(DEVICE), 1e-5, groups, plan, RowSite(), RowSite(), out, scale, pdl=False)
    grouped = y.double().unflatten(1, (groups, -1))
    exact = (grouped * (grouped.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(1) * gain
    upper, lower = out.cpu().double().chunk(2, 1)
    step = 16 * scale.cpu().double()[:, None]
    assert torch.allclose(step[:, 0] * 32512, exact.abs().amax(1), rtol=1e-6)
    assert ((256 * upper + lower) * step - exact).abs().max() <= 0.51 * float(step.max())


def test_rows_land_on_their_own_grids_and_in_the_ring() -> None:
    torch.manual_seed(0)
    outputs, columns, ring = 40, 64, (8, 24)
    layer = Linear(random_weight(outputs, columns, 8, None))
    shape = choose_shape(outputs, columns, Format.INT8_INT8)
    tiled = tile_linear(layer, Format.INT8_INT8, shape.tile_rows, DEVICE)
    inverse = torch.rand(len(tiled.factor), device=DEVICE) + 0.5
    inverse[32:] = 0  # stays float
    bounds = torch.full_like(inverse, 127.0)
    landing = Landing(inverse, -bounds, bounds, 1, *ring, slots=4)
    x = torch.randint(-127, 128, (2, columns), dtype=torch.int8)
    codes = torch.full((2, outputs), 99, dtype=torch.int8, device=DEVICE)
    values = torch.full((2, outputs), float("nan"), device=DEVICE)
    slots = torch.full((4, 2, ring[1] - ring[0]), 99, dtype=torch.int8, device=DEVICE)
    position = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    gemv(x.to(DEVICE), None, tiled, tiled.factor, landing, codes, values, slots, position, shape, pdl=False)
    y = (x.float() @ layer.weight.codes().float().T) * layer.weight.scale.reshape(-1)
    scaled = y * inverse[:outputs].cpu()
    landed = torch.copysign(torch.floor(scaled.abs() + 0.5), scaled).clamp(-127, 127)
    assert torch.equal(codes.cpu()[:, :8].float(), landed[:, :8])
    assert torch.equal(slots.cpu()[3].float(), landed[:, 8:24])
    assert torch.equal(codes.cpu()[:, 24:32].float(), landed[:, 24:32])
    assert torch.allclose(values.cpu()[:, 32:], y[:, 32:], rtol=1e-6)
    assert (codes.cpu()[:, 8:24] == 99).all() and (slots.cpu()[:3] == 99).all() and values.cpu()[:, :32].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [8, 64, 96, 512, 640])
def test_rotation_agrees_with_the_butterflies(size: int, family: Family) -> None:
    y = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    rotation = Rotation(size, size, family)
    out = torch.full((2, size), float("nan"), device=DEVICE)
    plan = plan_rotation(rotation, size, DEVICE)
    rotate(y.to(DEVICE), None, 0.0, 1, plan, RowSite(), RowSite(), out, torch.ones(2, device=DEVICE), pdl=False)
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
