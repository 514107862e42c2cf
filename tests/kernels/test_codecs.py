"""Codecs against brute force: every level, the nearest one, gradients, and what a scale strategy makes of two parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squamata import scales
from squamata.kernels.codec import CODECS
from squamata.kernels.grid import Grid
from squamata.kernels.levels import outermost, tables
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site, encode
from squamata.spec.formats import FORMATS
from squamata.spec.quant import QuantSpec

SIGNED = {name: form for name, form in FORMATS.items() if not form.absolute}  # the others: test_decay.py
SPECS = [(name, bits) for name, form in SIGNED.items() for bits in sorted({form.fewest, min(8, form.most), form.most})]
STEPS = st.floats(2.0**-10, 10.0)


def spec_of(codec: str, bits: int, **fields: str) -> QuantSpec:
    return QuantSpec(bits=bits, codec=codec, **fields)  # type: ignore[arg-type]


def grid_of(spec: QuantSpec, scale: float, ratio: float) -> Grid:
    """A grid whose second number, if any, is ``ratio`` times the scale."""
    one = torch.tensor(scale)
    return Grid.of(one, one * ratio if FORMATS[spec.codec].coarse else None)


def representable(spec: QuantSpec, grid: Grid) -> Tensor:
    """All values of a group, by the definition: (fine * scale + coarse * second) with both signs, float64."""
    fine, coarse = tables(spec.codec, spec.bits, torch.device("cpu"))
    values = fine.double() * grid.scale.double()
    if coarse is not None:
        assert grid.second is not None
        values = values + coarse.double() * grid.second.double()
    return torch.cat([-values, values])


@pytest.mark.parametrize(("codec", "bits"), SPECS)
def test_every_level_is_its_own_nearest(codec: str, bits: int) -> None:
    spec = spec_of(codec, bits)
    grid = grid_of(spec, 0.25, 40.0)
    low, high = spec.code_range
    codes = torch.arange(low, high + 1).to(torch.int16)
    values = QTensor(codes, grid.scale, spec, grid.second).dequantize()
    assert torch.equal(values.double().sort().values, representable(spec, grid)[1:].sort().values)
    assert torch.equal(encode(values, grid, spec).dequantize(), values)


@pytest.mark.parametrize("rounding", ["half-even", "half-away"])
@pytest.mark.parametrize(("codec", "bits"), SPECS)
@settings(max_examples=25, deadline=None)
@given(scale=STEPS, ratio=st.floats(0.5, 300.0), seed=st.integers(0, 2**20))
def test_the_nearest_level_is_taken(
    codec: str, bits: int, rounding: str, scale: float, ratio: float, seed: int
) -> None:
    spec = spec_of(codec, bits, rounding=rounding)
    grid = grid_of(spec, scale, ratio)
    _, high = outermost(grid.scale, grid.second, spec)
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.empty(300).uniform_(-5, 0.3, generator=generator) * high
    x = spread * torch.randn(300, generator=generator).sign()
    stored = encode(x, grid, spec)
    assert stored.data.dtype == getattr(torch, spec.carrier)
    best = (x.double()[:, None] - representable(spec, grid)).abs().min(1).values
    found = (x.double() - stored.dequantize().double()).abs()
    assert bool((found <= best * (1 + 1e-5) + 1e-6 * x.abs()).all())


@pytest.mark.parametrize(("codec", "bits"), SPECS)
def test_ties_and_truncation_follow_the_rounding(codec: str, bits: int) -> None:
    if codec in ("dual-scale", "dynamic-outlier"):
        pytest.skip("between two grids the nearer one is taken whatever the rounding")
    grid = grid_of(spec_of(codec, bits), 0.5, 8.0)
    _, top = spec_of(codec, bits).code_range
    codes = torch.arange(top + 1).to(torch.int16)
    values = QTensor(codes, grid.scale, spec_of(codec, bits), grid.second).dequantize()
    middle = (values[1:] + values[:-1]) / 2
    exact = (middle.double() * 2 == values[1:].double() + values[:-1].double()).nonzero()[:, 0]
    lower = exact  # the magnitude below each tie
    for rounding, expected in (
        ("half-even", lower + lower % 2), ("half-away", lower + 1), ("truncate", lower),
    ):  # fmt: skip
        spec = spec_of(codec, bits, rounding=rounding)
        assert torch.equal(encode(middle[exact], grid, spec).data.long(), expected)
        assert torch.equal(encode(-middle[exact], grid, spec).data.long(), -expected)


@pytest.mark.parametrize(("codec", "bits"), SPECS)
def test_codes_carried_in_float_are_the_integers(codec: str, bits: int) -> None:
    spec = spec_of(codec, bits)
    grid = grid_of(spec, 0.37, 21.0)
    x = 200 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    integers, floats = encode(x, grid, spec), encode(x, grid, spec, carry_float=True)
    assert floats.simulated and not integers.simulated
    assert torch.equal(integers.data.float(), floats.data)
    assert torch.equal(integers.dequantize(), floats.dequantize())


@pytest.mark.parametrize(("codec", "bits"), SPECS)
def test_gradients_pass_straight_through_between_the_outermost_levels(codec: str, bits: int) -> None:
    spec = spec_of(codec, bits)
    grid = grid_of(spec, 0.37, 21.0)
    _, high = outermost(grid.scale, grid.second, spec)
    x = (torch.tensor([-2.0, -0.9, -0.01, 0.3, 0.999, 1.5]) * high).requires_grad_()
    encode(x, grid, spec, carry_float=True).dequantize().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0]))


def test_gradient_of_the_scale_is_lsq() -> None:
    """d/ds of s * level(x / s), the rounding taken as the identity: level - x / s (Esser et al. 2020, eq. 3)."""
    spec = spec_of("soft-edge", 9)
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([1.04, 40.2, 100.3])
    encode(x, Grid.of(scale), spec, carry_float=True).dequantize().sum().backward()
    levels = torch.tensor([2.0, 80.0, 199.0])  # 2.08 -> 2 (steps 1/4), 80.4 -> 80 (steps 1), 200.6 -> 199 (steps 4)
    assert scale.grad is not None and torch.allclose(scale.grad, (levels - x / 0.5).sum(), atol=1e-4)


def fitted(spec: QuantSpec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    site = Site("s", Layout(("channel",), (x.shape[-1],)), spec)
    statistics = scales.gather_for(site.partition, spec)
    statistics.update(x)
    return scales.compute(statistics, spec)


def test_a_percentile_is_the_threshold_and_the_largest_value_ends_the_second_grid() -> None:
    x = torch.linspace(0, 1, 1001).reshape(1, 1, -1)
    x[..., -1] = 100.0
    clipped = {"percentile": {"alpha": 0.99}}
    scale, coarse = fitted(QuantSpec.model_validate({"bits": 5, "codec": "dual-scale", "scale": clipped}), x)
    assert torch.allclose(scale, torch.tensor(0.99 / 7)) and coarse is not None
    assert torch.allclose(coarse, torch.tensor(100.0 / 7))
    scale, tail = fitted(QuantSpec.model_validate({"bits": 8, "codec": "outlier-piecewise", "scale": clipped}), x)
    assert torch.allclose(scale, torch.tensor(0.99 / 120)) and tail is not None
    assert torch.allclose(tail, torch.tensor((100.0 - 0.99) / 7))
    scale, none = fitted(QuantSpec.model_validate({"bits": 9, "codec": "soft-edge", "scale": clipped}), x)
    assert torch.allclose(scale, torch.tensor(0.99 / 127)) and none is None
    channels = {"bits": 5, "codec": "dual-scale", "granularity": "channel"}
    scale, coarse = fitted(QuantSpec.model_validate(channels), x)
    assert coarse is not None and scale.shape == coarse.shape == (1001,) and torch.allclose(scale, coarse)


def test_the_dynamic_outlier_grid_is_taken_from_each_token() -> None:
    spec = spec_of("dynamic-outlier", 9)
    site = Site("s", Layout(("channel",), (3,)), spec, torch.tensor(1.0), mode="integer")
    x = torch.tensor([[[3.2, -254.0, 100.0], [127.0, 2.0, 508.0]]])
    stored = site.land(x)
    assert isinstance(stored, QTensor) and stored.second is not None
    assert stored.second.flatten().tolist() == [2.0, 4.0]
    assert stored.dequantize().tolist() == [[[3.0, -254.0, 100.0], [127.0, 2.0, 508.0]]]
    alone = site.land(x[:, 1:])
    assert isinstance(alone, QTensor) and torch.equal(alone.dequantize(), stored.dequantize()[:, 1:])


def test_wide_uniform_grids() -> None:
    x = torch.tensor([-1.0, 0.3, 1.0])
    for bits in (9, 12, 16):
        spec = QuantSpec(bits=bits)
        stored = encode(x, Grid.of(torch.tensor(1 / spec.span)), spec)
        assert stored.data.dtype == torch.int16 and stored.data.tolist()[0] == -spec.code_range[1]
        assert float((stored.dequantize() - x).abs().max()) <= 0.5001 / spec.span
    asymmetric = QuantSpec(bits=16, symmetric=False)
    stored = encode(x, Grid.of(torch.tensor(2 / 65535), torch.tensor(-1.0)), asymmetric)
    assert float((stored.dequantize() - x).abs().max()) <= 1.6 / 65535
    assert set(CODECS) == {"uniform", "table", *FORMATS}
