"""The float32 kernels of calibration against the reference, in Triton's interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from squamata.kernels.causal_conv1d import ref as conv_reference
from squamata.kernels.causal_conv1d import triton as conv
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.partition import Layout
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan import ref as scan_reference
from squamata.kernels.ssd_scan import triton as scan

DEVICE = "cpu" if INTERPRETED else "cuda"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize(("length", "taps", "bias"), [(1, 4, True), (2, 4, False), (70, 4, True), (33, 2, True)])
def test_convolution(length: int, taps: int, bias: bool) -> None:
    """Several inputs, parts of wider tensors, going on from a state; and from the state that is left."""
    sizes = (150, 20)
    sites = [Site("", Layout(("channel",), (size,))) for size in sizes]
    both = random(2, length, 3 + sum(sizes))
    weight, shift = random(sum(sizes), taps, seed=1), random(sum(sizes), seed=2) if bias else None
    state = random(2, sum(sizes), taps - 1, seed=3)
    theirs, state_theirs = list(both[..., 3:].split(sizes, -1)), state.clone()
    wanted = conv_reference.run(theirs, weight, shift, state_theirs, sites)
    both, weight, state_ours = on_device(both, weight, state)
    ours = list(both[..., 3:].split(sizes, -1))
    found = conv.run(ours, weight, None if shift is None else shift.to(DEVICE), state_ours, sites)
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
    assert torch.equal(state_ours.cpu(), state_theirs)


@pytest.mark.parametrize(
    ("length", "heads", "channels", "groups", "width"),
    [(16, 2, 16, 1, 16), (130, 4, 16, 2, 16), (64, 3, 24, 1, 20), (257, 2, 64, 1, 128)],
)
def test_scan(length: int, heads: int, channels: int, groups: int, width: int) -> None:
    """Against the float64 reference, from a state, time steps near their limits; nothing left unwritten."""
    layout = HeadLayout(heads, channels, groups, width, 64, (1e-3, 0.5))
    u, dt = random(2, length, heads * channels), 3 * random(2, length, heads, seed=1) - 3
    B, C = random(2, length, groups * width + 5, seed=2), random(2, length, groups * width, seed=3)
    A, D = -4 * torch.rand(heads) - 0.1, random(heads, seed=4)
    bias, state = random(heads, seed=5), random(2, heads, channels, width, seed=6)
    parts = (u, dt, A, B[..., 5:], C, D, bias, state)
    wanted = scan_reference.run(*(part.double() for part in parts), layout)
    found = scan.run(*on_device(u, dt, A), B.to(DEVICE)[..., 5:], *on_device(C, D, bias, state), layout)
    for one, other in zip(found, wanted, strict=True):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < 2e-6
