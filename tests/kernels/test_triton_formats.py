"""Packed 4 + 1 bit codes in Triton kernels, against the reference's decoding; in the interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

import triton
import triton.language as tl

from squamata.kernels.gpu.formats import read_flagged
from squamata.kernels.gpu.gemv import INTERPRETED, Shape, product
from squamata.kernels.gpu.scan import InputPlan, selective_step
from squamata.kernels.gpu.tiles import Format, tile_linear
from squamata.kernels.linear import Linear
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site
from squamata.spec.quant import QuantSpec

DEVICE = "cpu" if INTERPRETED else "cuda"


def landed(x: Tensor) -> QTensor:
    """x (B, L, C) on a dual-scale site with a scale a channel."""
    spec = QuantSpec.model_validate({"bits": 5, "codec": "dual-scale", "granularity": "channel"})
    site = Site("u", Layout(("channel",), (x.shape[-1],)), spec, mode="integer")
    scale = (0.5 + torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(1))) / 7
    site.set_scale(scale, 3 * scale)
    value = site.land(x)
    assert isinstance(value, QTensor) and value.second is not None
    return value


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@triton.jit
def _copy(packed, fine, coarse, out, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    mask = channel < C
    steps = (tl.load(fine + channel, mask=mask, other=0.0), tl.load(coarse + channel, mask=mask, other=0.0))
    tl.store(out + row * C + channel, read_flagged(packed, row, C, channel, mask, steps[0], steps[1]), mask=mask)


@pytest.mark.parametrize("channels", [1, 7, 8, 33, 70])
def test_rows_are_decoded_exactly(channels: int) -> None:
    value = landed(2 * random(1, 5, channels))
    assert value.second is not None
    out = torch.full((5, channels), float("nan"), device=DEVICE)
    parts = [part.to(DEVICE) for part in (value.data[0].contiguous(), value.scale, value.second)]
    _copy[(5,)](*parts, out, C=channels, BLOCK=triton.next_power_of_2(channels))
    assert torch.equal(out.cpu(), value.dequantize()[0])


@pytest.mark.parametrize(("batch", "channels", "states"), [(2, 70, 16), (1, 33, 5)])
def test_the_scan_step_reads_packed_rows(batch: int, channels: int, states: int) -> None:
    """The same state and output, bit for bit, as with the decoded values in float."""
    value = landed(2 * random(batch, 1, channels))
    assert value.second is not None
    one = torch.ones(max(channels, 2 * states), device=DEVICE)
    gate, low = (random(batch, size, seed=size).to(DEVICE) for size in (channels, 4 + 2 * states))
    tables = [random(channels, seed=3), -random(channels, states, seed=4).exp(), random(channels, seed=5)]
    linear = tile_linear(Linear(random(channels, 4, seed=7)), Format.FLOAT32_FLOAT, 8, DEVICE)
    dt = product(low[:, :4], None, linear, linear.factor, None, (None, gate), None, Shape(8, 1))
    plain = InputPlan(False, one)
    found = []
    for u, plan in (
        (value.data[:, 0], InputPlan(True, value.scale.to(DEVICE), value.second.to(DEVICE))),
        (value.dequantize()[:, 0], plain),
    ):
        state = random(batch, channels, states, seed=6).to(DEVICE)
        out = torch.full((batch, channels), float("nan"), device=DEVICE)
        selective_step(
            u.contiguous().to(DEVICE), gate, dt, (low, low), {"u": plan, "BC": plain},
            tuple(table.to(DEVICE) for table in tables), state, None, out, 4, pdl=False,
        )  # fmt: skip
        assert not out.isnan().any()
        found.append((out.cpu(), state.cpu()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
