"""Float rows by integer weights on the CPU: as 16-bit integers, within half a step of every activation, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squamata.kernels.halves import GROUP, LARGEST
from squamata.kernels.linear import Linear, int4
from squamata.kernels.linear import cpu as linear_cpu
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site
from squamata.spec.quant import QuantSpec

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = ((33, 128), (80, 384), (16, 256), (1, 128), (150, 1536))


def weight_of(rows: int, columns: int, bits: int, per: str) -> QTensor:
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest - 1, largest + 1, (rows, columns), dtype=torch.int8)
    codes[:1] = -largest - 1
    spec = QuantSpec.model_validate({"bits": bits, "granularity": per, "full_range": True})
    groups = -(-columns // GROUP) if per.startswith("group") else 1
    scale = 0.01 * (0.5 + torch.rand(rows, groups))
    return QTensor(pack_int4(codes), scale, spec, length=columns) if bits == 4 else QTensor(codes, scale, spec)


def activations(*shape: int) -> Tensor:
    """Rows of very different sizes, with outliers, and one of nothing but zeros."""
    x = torch.randn(shape) * torch.logspace(-6, 6, shape[-2])[:, None]
    x[..., 3] *= 100
    x[..., 0, :] = 0
    return x


def furthest(x: Tensor, weight: QTensor, group: int) -> Tensor:
    """How far half a step of every activation takes each product (..., N), float64."""
    steps = x.double().abs().unflatten(-1, (-1, group)).amax(-1) / LARGEST
    magnitudes = weight.dequantize().double().abs()
    rounded = 0.5 * steps @ magnitudes.unflatten(-1, (-1, group)).sum(-1).T
    return 1.001 * rounded + 1e-6 * x.double().abs() @ magnitudes.T


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits, per", ((4, "group(128)"), (8, "channel"), (8, "tensor")))
def test_every_activation_is_rounded_to_sixteen_bits(rows: int, columns: int, bits: int, per: str) -> None:
    weight, bias = weight_of(rows, columns, bits, per), torch.randn(rows)
    if per == "tensor":
        weight.scale = torch.tensor(0.02)
    segments = (rows - rows // 3, rows // 3) if rows > 2 else (rows,)
    for length in (1, 3, 17, 131):
        x = activations(2, length, columns)
        layer = Linear(weight, bias, segments, sixteen_bits=True)
        assert linear_cpu.accepts(x, layer, [None] * len(segments))
        results = linear_cpu.run(x, layer, [None] * len(segments))
        assert [tuple(value.shape) for value in results] == [(2, length, n) for n in segments]
        exact = x.double() @ weight.dequantize().double().T + bias
        bound = furthest(x, weight, GROUP if bits == 4 else columns) + 1e-6 * bias.abs()
        assert ((torch.cat(results, -1) - exact).abs() <= bound).all()  # type: ignore[arg-type]


def test_many_rows_are_split_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(70, 256, 4, "group(128)"), activations(1, 300, 256)
    (whole,) = linear_cpu.run(x, Linear(weight, sixteen_bits=True), [None])
    monkeypatch.setattr(linear_cpu, "WIDE_ROWS", 8 * int4.TOKENS)
    monkeypatch.setattr(linear_cpu, "ACCUMULATOR_BYTES", 0)
    (parts,) = linear_cpu.run(x, Linear(weight, sixteen_bits=True), [None])
    assert torch.equal(whole, parts)  # type: ignore[arg-type]
    wide = weight_of(70, 256, 8, "channel")
    (turns,) = linear_cpu.run(x, Linear(wide, sixteen_bits=True), [None])
    monkeypatch.undo()
    assert torch.equal(turns, linear_cpu.run(x, Linear(wide, sixteen_bits=True), [None])[0])  # type: ignore[arg-type]


def test_a_product_lands_on_its_site() -> None:
    x, weight = torch.randn(2, 9, 256), weight_of(48, 256, 4, "group(128)")
    site = Site("site", Layout(("channel",), (16,)), QuantSpec(bits=8), mode="integer")
    site.set_scale(torch.tensor(0.05))
    landed, floats = linear_cpu.run(x, Linear(weight, None, (16, 32), sixteen_bits=True), [site, None])
    both = linear_cpu.run(x, Linear(weight, None, (16, 32), sixteen_bits=True), [None, None])
    assert isinstance(landed, QTensor)
    assert torch.equal(landed.data, site.land(both[0]).data)  # type: ignore[arg-type, union-attr]
    assert torch.equal(floats, both[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("bits, per", ((4, "group(128)"), (8, "channel")))
@pytest.mark.parametrize("what", (float("nan"), float("inf"), -float("inf")))
def test_what_is_not_finite_stays_so_in_its_row(bits: int, per: str, what: float) -> None:
    weight, x = weight_of(20, 256, bits, per), torch.randn(1, 5, 256)
    x[0, 2, 200] = what
    (y,) = linear_cpu.run(x, Linear(weight, sixteen_bits=True), [None])
    assert not y[0, 2].isfinite().any()  # type: ignore[index]
    assert y[0, [0, 1, 3, 4]].isfinite().all()  # type: ignore[index]


def test_columns_that_are_no_whole_groups_stay_float() -> None:
    weight, x = weight_of(40, 200, 4, "group(128)"), torch.randn(2, 7, 200)
    (y,) = linear_cpu.run(x, Linear(weight, sixteen_bits=True), [None])
    exact = x.double() @ weight.dequantize().double().T
    assert (y - exact).norm() <= 1e-6 * exact.norm()  # type: ignore[operator]
