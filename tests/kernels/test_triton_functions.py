"""The activation functions of the GPU kernels against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

import triton
import triton.language as tl

from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import silu, softplus

DEVICE = "cpu" if INTERPRETED else "cuda"


@triton.jit
def _both(x, smooth, gated, N: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    given = tl.load(x + at)
    tl.store(smooth + at, softplus(given))
    tl.store(gated + at, silu(given, NATIVE))


@pytest.mark.parametrize("native", [False] if INTERPRETED else [False, True])
def test_softplus_and_silu_keep_their_relative_precision(native: bool) -> None:
    x = torch.cat([torch.linspace(-80, 80, 4000), torch.linspace(-1, 1, 96)])
    smooth, gated = torch.full((2, 4096), float("nan"), device=DEVICE)
    _both[(1,)](x.to(DEVICE), smooth, gated, N=4096, NATIVE=native)
    wanted = torch.log1p(torch.exp(x.double()))
    error = ((smooth.cpu().double() - wanted) / wanted).abs()
    assert float(error.max()) < 1e-5  # exp of a rounded product: 80 * 2^-23
    assert float(error[x.abs() < 5].max()) < 1e-6
    exact = torch.nn.functional.silu(x.double())
    assert float((gated.cpu().double() - exact).abs().max()) < 1e-5
