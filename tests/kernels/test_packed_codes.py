"""Codes of 4 + 1 bits: their bytes, and that every reader of packed rows sees what the reference decodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from squamata.kernels.conv_selective_scan.ref import tokens
from squamata.kernels.landing import read_row, source
from squamata.kernels.packing import pack_flagged, unpack_flagged
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.selective_scan import cpu as scan_cpu
from squamata.kernels.selective_scan import ref as scan_ref
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan import cpu as ssd_cpu
from squamata.kernels.ssd_scan import ref as ssd_ref
from squamata.spec.quant import QuantSpec

SIZES = (1, 2, 7, 8, 9, 16, 33, 70, 130)


def landed(x: Tensor, per: str = "tensor", mode: str = "integer") -> QTensor:
    """x (B, L, C) on a dual-scale site whose threshold is 1 and whose coarse grid ends near the largest value."""
    spec = QuantSpec.model_validate({"bits": 5, "codec": "dual-scale", "granularity": per})
    site = Site("u", Layout(("channel",), (x.shape[-1],)), spec, mode=mode)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    scale = (0.5 + torch.rand(site.partition.shape(), generator=generator)) / 7
    site.set_scale(scale, 3 * scale)
    value = site.land(x)
    assert isinstance(value, QTensor)
    return value


def unpacked(value: QTensor) -> QTensor:
    assert value.length is not None
    return replace(value, data=unpack_flagged(value.data, value.length), length=None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_bytes() -> None:
    """Nibbles in two's complement, even element low; then the flags, element 0 in the lowest bit."""
    codes = torch.tensor([1, -2, 14, -8, 3], dtype=torch.int8)  # values 1, -2, 7, -1, 3; flags 0, 0, 1, 1, 0
    assert bytes(pack_flagged(codes).tolist()) == bytes([0xE1, 0xF7, 0x03, 0b01100])


@pytest.mark.parametrize("size", SIZES)
def test_every_code_survives_at_every_place(size: int) -> None:
    codes = torch.arange(-14, 15, dtype=torch.int8).repeat(size)[: 29 * size].reshape(29, size)
    packed = pack_flagged(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (29, -(-size // 2) + -(-size // 8))
    assert torch.equal(unpack_flagged(packed, size), codes)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("size", SIZES)
def test_a_site_packs_and_decodes_to_the_simulated_values(size: int, per: str) -> None:
    x = random(2, 3, size)
    packed, simulated = landed(x, per), landed(x, per, mode="simulate")
    assert packed.shape == x.shape and packed.data.nbytes == 6 * (-(-size // 2) + -(-size // 8))
    assert torch.equal(packed.codes().float(), simulated.data)
    assert torch.equal(packed.dequantize(), simulated.dequantize())
    assert torch.equal(packed.dequantize(), unpacked(packed).dequantize())
    cut = tokens(packed, 1, 3)
    assert torch.equal(cut.dequantize(), packed.dequantize()[:, 1:3])  # type: ignore[union-attr]


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_read_any_part_of_a_row_exactly(size: int, per: str) -> None:
    value = landed(3 * random(2, 3, size), per)
    origin, expected = source(value), value.dequantize().reshape(6, size).numpy()
    assert origin.flagged.size and not origin.codes.size and not origin.values.size
    for first in {0, 1, size // 2, size - 1}:
        out = np.full(size - first, np.nan, np.float32)
        for row in range(6):
            read_row(origin, row, first, out)
            assert np.array_equal(out, expected[row, first:])


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize(("batch", "length", "channels", "states"), [(2, 1, 70, 16), (1, 37, 33, 5), (3, 18, 130, 16)])
def test_selective_scan_reads_packed_rows(batch: int, length: int, channels: int, states: int, per: str) -> None:
    u = landed(random(batch, length, channels), per)
    dt, z = (random(batch, length, channels, seed=seed) for seed in (2, 3))
    B, C = (random(batch, length, states, seed=seed) for seed in (4, 5))
    A, state = -torch.exp(random(channels, states, seed=6)), random(batch, channels, states, seed=7)
    D, bias = random(channels, seed=8), random(channels, seed=9)
    case = (dt, A, B, C, D, z, bias, state, Site("y", Layout(("channel",), (channels,))))
    assert scan_cpu.accepts(u, *case)
    y, last = scan_cpu.run(u, *case)
    plain, plain_last = scan_cpu.run(u.dequantize(), *case)
    assert torch.equal(y, plain) and torch.equal(last, plain_last)  # type: ignore[arg-type]
    expected, expected_last = scan_ref.run(u, *case)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("length", [1, 5, 67])
@pytest.mark.parametrize(("heads", "head_dim", "groups", "states"), [(4, 8, 2, 16), (3, 5, 1, 13), (2, 80, 2, 24)])
def test_ssd_scan_reads_packed_rows(heads: int, head_dim: int, groups: int, states: int, length: int, per: str) -> None:
    layout = HeadLayout(heads, head_dim, groups, states, 64, (0.0, float("inf")))
    u = landed(random(2, length, heads * head_dim), per)
    dt = random(2, length, heads, seed=2) - 2
    B, C = (random(2, length, groups * states, seed=seed) for seed in (4, 5))
    A, D, bias = -torch.exp(random(heads, seed=6)), random(heads, seed=8), random(heads, seed=9)
    case = (dt, A, B, C, D, bias, random(2, heads, head_dim, states, seed=7), layout)
    assert ssd_cpu.accepts(u, *case)
    y, last = ssd_cpu.run(u, *case)
    plain, plain_last = ssd_cpu.run(u.dequantize(), *case)
    assert torch.equal(y, plain) and torch.equal(last, plain_last)
    expected, expected_last = ssd_ref.run(u, *case)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last, expected_last, rtol=1e-3, atol=1e-4)
