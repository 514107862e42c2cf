"""Many tokens through the GPU kernels against the reference, in Triton's interpreter: no GPU needed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from test_triton_decode import CASES, DEVICE, random_weight, recipe, small
from tiny import perturbed_tensors, quantized, random_ids

from squamata.kernels.dispatch import use_backend
from squamata.kernels.gpu.expand import as_rows, expand, finish_sums, multiply, rows_of, scratch_bytes
from squamata.kernels.gpu.gemm import LAND, PLAIN, RESIDUAL, SOFTPLUS, SPLIT, Config, Finish, gemm, permuted
from squamata.kernels.gpu.gemv import Landing, choose_shape
from squamata.kernels.gpu.norm import RowSite
from squamata.kernels.gpu.rows import plan_row_rotation, rotate_rows
from squamata.kernels.gpu.scan import InputPlan
from squamata.kernels.gpu.tiles import Format, TiledLinear, tile_linear
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.ref import rotate as rotate_reference
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import QTensor
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder

CONFIG = Config(16, 16, 64, 4, 2)
ROWS, OUTPUTS, COLUMNS = 19, 37, 192


def order(format: Format, columns: int) -> torch.Tensor:
    """Column k of the activations goes to ``order[k]``."""
    return permuted.fn(torch.arange(columns), int(format))


def product(
    format: Format, bits: int, group: int | None, bias: bool = True
) -> tuple[TiledLinear, torch.Tensor, torch.Tensor]:
    """A tiled weight, activations in its order, and the exact product in float64."""
    weight: Any = (
        random_weight(OUTPUTS, COLUMNS, bits, group) if bits else torch.randn(OUTPUTS, COLUMNS).bfloat16().float()
    )
    layer = Linear(weight, torch.randn(OUTPUTS) if bias else None)
    tiled = tile_linear(layer, format, choose_shape(OUTPUTS, COLUMNS, format).tile_rows, DEVICE)
    if format.integer_activations:
        x = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8)
    else:
        x = torch.randn(ROWS, COLUMNS).bfloat16().float()
    values = weight.dequantize(torch.float64) if isinstance(weight, QTensor) else weight.double()
    exact = x.double() @ values.T + (layer.bias.double() if layer.bias is not None else 0)
    placed = torch.empty_like(x)
    placed[:, order(format, COLUMNS)] = x
    return tiled, placed.to(DEVICE), exact


FORMATS = [
    (Format.INT8_INT8, 8, None),
    (Format.INT8_INT8, 8, 64),
    (Format.INT4_INT8, 4, 64),
    (Format.INT4_INT8, 4, None),
    (Format.INT4_FLOAT, 4, 32),
    (Format.INT8_FLOAT, 8, None),
    (Format.INT8_FLOAT, 8, 32),
    (Format.FLOAT32_FLOAT, 0, None),
]


@pytest.mark.parametrize(("format", "bits", "group"), FORMATS)
def test_product_agrees_with_the_exact_one(format: Format, bits: int, group: int | None) -> None:
    torch.manual_seed(1)
    tiled, x, exact = product(format, bits, group)
    out = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    gemm(x, None, tiled, tiled.factor, None, Finish(PLAIN, values=out), CONFIG)
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("format", "bits", "group"), [(Format.BFLOAT16_FLOAT, 0, None), (Format.INT4_FLOAT, 4, 32)])
def test_bfloat16_operands_are_multiplied_exactly(format: Format, bits: int, group: int | None) -> None:
    torch.manual_seed(2)
    tiled, x, exact = product(format, bits, group, bias=False)
    out = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    gemm(x.bfloat16(), None, tiled, tiled.factor, None, Finish(PLAIN, values=out), CONFIG)
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def grids(padded: int, floats_from: int) -> Landing:
    inverse = torch.rand(padded, device=DEVICE) + 0.5
    inverse[floats_from:] = 0
    bounds = torch.full_like(inverse, 127.0)
    return Landing(inverse, -bounds, bounds, 1, scale=1 / inverse)


def landed(exact: torch.Tensor, landing: Landing) -> torch.Tensor:
    scaled = exact.float() * landing.inverse[:OUTPUTS].cpu()
    return torch.copysign(torch.floor(scaled.abs() + 0.5), scaled).clamp(-127, 127)


@pytest.mark.parametrize("format", [Format.INT8_INT8, Format.INT4_INT8])
def test_outputs_land_on_their_grids_or_stay(format: Format) -> None:
    torch.manual_seed(3)
    tiled, x, exact = product(format, 8 if format == Format.INT8_INT8 else 4, None, bias=False)
    landing = grids(len(tiled.factor), 32)
    codes = torch.full((ROWS, OUTPUTS), 99, dtype=torch.int8, device=DEVICE)
    values = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    gemm(x, None, tiled, tiled.factor, landing, Finish(LAND, codes, values), CONFIG)
    wanted = landed(exact, landing)
    assert torch.equal(codes.cpu()[:, :32].float(), wanted[:, :32]) and (codes.cpu()[:, 32:] == 99).all()
    assert torch.allclose(values.cpu()[:, 32:].double(), exact[:, 32:], rtol=1e-5, atol=1e-4)
    assert values.cpu()[:, :32].isnan().all()


def test_residual_split_and_softplus() -> None:
    torch.manual_seed(4)
    tiled, x, exact = product(Format.INT8_INT8, 8, None, bias=False)
    residual = torch.randn(ROWS, OUTPUTS, device=DEVICE)
    before = residual.clone().cpu()
    gemm(x, None, tiled, tiled.factor, None, Finish(RESIDUAL, residual=residual), CONFIG)
    assert torch.allclose(residual.cpu(), before + exact.float(), rtol=1e-5, atol=1e-4)
    landing = grids(len(tiled.factor), OUTPUTS)
    wanted = landed(exact, landing)
    read_again = wanted * landing.scale[:OUTPUTS].cpu()
    low = torch.full((ROWS, 16), 99, dtype=torch.int8, device=DEVICE)
    rest = torch.full((ROWS, OUTPUTS - 16), float("nan"), device=DEVICE)
    gemm(x, None, tiled, tiled.factor, landing, Finish(SPLIT, low, rest, split_at=16), CONFIG)
    assert torch.equal(low.cpu().float(), wanted[:, :16])
    assert torch.allclose(rest.cpu(), read_again[:, 16:], rtol=1e-6)
    out = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    shift = torch.randn(len(tiled.factor), device=DEVICE)
    gemm(x, None, tiled, tiled.factor, landing, Finish(SOFTPLUS, values=out, shift=shift), CONFIG)
    wanted = torch.nn.functional.softplus(read_again.double() + shift[:OUTPUTS].cpu().double())
    assert torch.allclose(out.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "groups"), [(64, 1), (128, 2), (640, 1), (512, 4)])
@pytest.mark.parametrize("exact", [True, False])
def test_rotation_of_rows_agrees_with_the_butterflies(size: int, groups: int, exact: bool) -> None:
    torch.manual_seed(size)
    y, z, gain = torch.randn(3, size), torch.randn(3, size + 5), torch.rand(size) + 0.5
    rotation = Rotation.of_size(size)
    plan = plan_row_rotation(rotation, size, exact, DEVICE)
    out = torch.full((3, size), float("nan"), device=DEVICE)
    z_input = InputPlan(False, torch.ones(size, device=DEVICE))
    given = (y.to(DEVICE), (z.to(DEVICE),) * 2, z_input, 5)
    tolerance = 1e-5 if exact else 2e-3
    gated = y * torch.nn.functional.silu(z[:, 5:])
    for weight in (gain, None):
        rotate_rows(*given, None if weight is None else gain.to(DEVICE), 1e-5, groups, plan, RowSite(), RowSite(), out)
        wanted = gated
        if weight is not None:
            grouped = gated.view(3, groups, -1)
            wanted = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(3, size) * gain
        wanted = rotate_reference(wanted, rotation)
        assert float((out.cpu() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in ("mamba1", "mamba2") for case in CASES]
    if DEVICE == "cuda"
    else [("mamba1", "w4a16"), ("mamba2", "w8a8")],  # interpreted, one takes half a minute
)
def test_prompt_and_what_follows_agree_with_the_reference(kind: str, case: str) -> None:
    config = small(kind)
    checkpoint = quantized(config, perturbed_tensors(config), recipe(case), [random_ids(config, 2, 24)])
    model = LanguageModel(checkpoint)
    ids = random_ids(config, 2, 22, seed=1)
    tolerance = 1e-5 if case in ("float", "w4a16") else 3e-2  # a code that flips at a tie goes on
    with use_backend("ref"), torch.no_grad():
        cache = model.new_cache(2)
        decoder = CapturedDecoder(model, 2, DEVICE, weights="float32", pdl=False)
        for span in ((0, 19), (19, 20), (20, 22)):  # a piece that is padded, one that is shorter than the ring
            wanted = model.forward(ids[:, slice(*span)], cache, last_only=True)[:, -1]
            decoder.logits.fill_(float("nan"))
            got = decoder.prefill(ids[:, slice(*span)].to(DEVICE)).cpu()
            assert float((got - wanted).norm() / wanted.norm()) < tolerance, span
        next_ids = wanted.argmax(-1)
        wanted = model.step(next_ids, cache)
        got = decoder.step(next_ids.to(DEVICE)).cpu()
        assert float((got - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"] if DEVICE == "cuda" else ["mamba2"])
def test_sequences_of_other_lengths_do_not_disturb_each_other(kind: str) -> None:
    config = small(kind)
    model = LanguageModel(quantized(config, perturbed_tensors(config), recipe("float"), []))
    ids, lengths = random_ids(config, 3, 18, seed=2), (18, 2, 7)
    with use_backend("ref"), torch.no_grad():
        decoder = CapturedDecoder(model, 3, DEVICE, weights="float32", pdl=False)
        got = decoder.prefill(ids.to(DEVICE), lengths).cpu().clone()
        after = decoder.step(ids[:, 0].to(DEVICE)).cpu()
        for row, length in enumerate(lengths):
            cache = model.new_cache(1)
            alone = model.forward(ids[row : row + 1, :length], cache, last_only=True)[0, -1]
            assert torch.allclose(got[row], alone, atol=1e-4)
            assert torch.allclose(after[row], model.step(ids[row : row + 1, 0], cache)[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"] if DEVICE == "cuda" else ["mamba1"])
def test_a_large_batch_steps_as_the_reference(kind: str) -> None:
    config = small(kind)
    checkpoint = quantized(config, perturbed_tensors(config), recipe("w4a8"), [random_ids(config, 2, 24)])
    model = LanguageModel(checkpoint)
    ids = random_ids(config, 18, 5, seed=3)
    with use_backend("ref"), torch.no_grad():
        cache = model.new_cache(18)
        decoder = CapturedDecoder(model, 18, DEVICE, weights="float32", pdl=False)
        for token in range(5):
            wanted = model.step(ids[:, token], cache)
            got = decoder.step(ids[:, token].to(DEVICE)).cpu()
            assert float((got - wanted).norm() / wanted.norm()) < 3e-2
            assert torch.equal(decoder.ids.cpu(), got.argmax(-1))


@pytest.mark.parametrize(
    ("format", "bits", "group"),
    [(Format.INT8_INT8, 8, None), (Format.INT8_INT8, 8, 32), (Format.INT4_INT8, 4, None), (Format.INT4_INT8, 4, 64)],
)
def test_integer_products_of_weights_laid_out_by_rows_are_exact(format: Format, bits: int, group: int | None) -> None:
    torch.manual_seed(5)
    tiled, x, exact = product(format, bits, group)
    weight = rows_of(tiled, torch.zeros(scratch_bytes(tiled), dtype=torch.uint8, device=DEVICE))
    expand(tiled, weight)
    out = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    gemm(x, None, as_rows(tiled, weight), tiled.factor, None, Finish(PLAIN, values=out), CONFIG)
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("format", "bits", "group"), [(Format.BFLOAT16_FLOAT, 0, None), (Format.INT4_FLOAT, 4, 32)])
def test_the_library_multiplies_weights_laid_out_by_rows(format: Format, bits: int, group: int | None) -> None:
    torch.manual_seed(6)
    tiled, x, exact = product(format, bits, group)
    weight = rows_of(tiled, torch.zeros(scratch_bytes(tiled), dtype=torch.uint8, device=DEVICE))
    expand(tiled, weight)
    sums = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    out = torch.full((ROWS, OUTPUTS), float("nan"), device=DEVICE)
    multiply(x.bfloat16(), weight, sums)
    finish_sums(sums, None, tiled, tiled.factor, None, Finish(PLAIN, values=out))
    error = float((out.cpu() - exact).norm() / exact.norm())
    assert error < (1e-6 if bits == 0 else 3e-3)
