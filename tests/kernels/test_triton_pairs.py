"""float32 products by pairs of float16, against float64; in Triton's interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.pairs import HIGH_HIGH_LOW, HIGH_LOW, product, second_moments, split_rows

DEVICE = "cpu" if INTERPRETED else "cuda"


def spread(rows: int, width: int, seed: int) -> Tensor:
    """Rows of very different size, with outliers inside them, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 10.0 ** torch.linspace(-12, 12, rows)[:, None]
    x[:, 3] *= 1000
    x[rows // 2] = 0
    return x


@pytest.mark.parametrize("shared", [False, True])
def test_a_pair_is_the_number_to_22_bits_of_the_largest(shared: bool) -> None:
    x = spread(9, 50, 0)
    pairs = split_rows(x.to(DEVICE), HIGH_LOW, shared)
    high, low = pairs.parts.double().cpu().split(50, dim=1)
    value = (high + low) * pairs.factor.double().cpu()[:, None]
    largest = x.abs().amax() if shared else x.abs().amax(1, keepdim=True)
    assert ((value - x).abs() <= largest.double() * 2.0**-22).all()
    assert (torch.frexp(pairs.factor.cpu()).mantissa == 0.5).all()  # powers of two


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_float32(bias: bool) -> None:
    """The error of an output, in units of |x| |w|: some 2^-22, and that of summing in float32."""
    x, weight = spread(17, 130, 1), spread(33, 130, 2)
    added = torch.randn(33) if bias else None
    y = product(x.to(DEVICE), split_rows(weight.to(DEVICE), HIGH_HIGH_LOW), None if added is None else added.to(DEVICE))
    wanted = x.double() @ weight.double().T + (0 if added is None else added.double())
    unit = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + wanted.abs()
    assert ((y.cpu().double() - wanted).abs() <= 1e-6 * unit).all()


def test_second_moments() -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(3)) * 10.0 ** torch.linspace(-2, 2, 40)
    wanted = x.double().T @ x.double()
    found = second_moments(x.to(DEVICE)).cpu().double()
    unit = wanted.diagonal().sqrt()[:, None] * wanted.diagonal().sqrt()
    assert ((found - wanted).abs() <= 2e-6 * unit).all()
