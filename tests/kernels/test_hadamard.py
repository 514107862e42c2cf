"""Hadamard matrices are what they say, and the fast rotation is the product with them."""

from __future__ import annotations

import pytest
import torch

from squamata.kernels.dispatch import use_backend
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.matrices import decompose, hadamard_matrix
from squamata.kernels.hadamard.ref import rotate
from squamata.kernels.hadamard.triton import run as rotate_on_a_gpu
from squamata.kernels.ops import hadamard
from squamata.kernels.partition import Layout
from squamata.kernels.site import Site
from squamata.spec.quant import QuantSpec

KNOWN = sorted({m << k for m in (1, 12, 20, 28) for k in range(7)})
WIDTHS = [1 << 10, 1536, 2560, 3584, 5120]  # 2^k, 12 * 2^7, 20 * 2^7, 28 * 2^7, 40 * 2^7: published d_inner


@pytest.mark.parametrize("order", KNOWN)
def test_rows_are_orthogonal_signs(order: int) -> None:
    matrix = hadamard_matrix(order).double()
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_orders_up_to_64_that_are_known() -> None:
    known = {order for order in range(1, 65) if decompose(order) is not None}
    assert known == {order for order in KNOWN if order <= 64} and len(known) == 14
    for order in (3, 6, 36, 44, 52, 60):
        with pytest.raises(ValueError, match=str(order)):
            hadamard_matrix(order)


@pytest.mark.parametrize("width", [1, 2, 12, 24, 40, 56, 64, 320, 448, *WIDTHS])
def test_fast_rotation_is_the_product_with_the_matrix(width: int) -> None:
    rotation = Rotation.of_size(width)
    assert rotation == Rotation(width, width)
    x = torch.randn(3, 2, width, dtype=torch.float64)
    expected = x @ hadamard_matrix(width).double().T / width**0.5
    assert (rotate(x, rotation) - expected).abs().max() <= 1e-12 * width**0.5


@pytest.mark.parametrize("width", [12, 40, 64, 384, 640, 1536, 5120])
def test_the_matrices_of_another_library(width: int) -> None:
    """Order 40 instead of 20: what is rotated by one family is not undone by the other, unless 2^k."""
    rotation = Rotation(width, width, "fast-hadamard-transform")
    x = torch.randn(3, width, dtype=torch.float64)
    matrix = hadamard_matrix(width, "fast-hadamard-transform").double()
    assert torch.equal(matrix @ matrix.T, width * torch.eye(width, dtype=torch.float64))
    expected = x @ matrix.T / width**0.5
    assert (rotate(x, rotation) - expected).abs().max() <= 1e-12 * width**0.5
    assert torch.equal(rotate(x, rotation), rotate(x, Rotation.of_size(width))) == (width == 64)
    out = Site("out", Layout(("channel",), (width,)))
    with use_backend("cpu"):
        found = hadamard(x.float(), rotation, out)
    assert isinstance(found, torch.Tensor) and (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("width", "block"), [(3, 1), (74, 2), (66, 2), (96 * 3, 96), (48 * 11, 48), (720, 80), (9 * 128, 384)]
)
def test_without_a_matrix_the_largest_blocks_that_have_one(width: int, block: int) -> None:
    rotation = Rotation.of_size(width)
    assert rotation == Rotation(width, block)
    applied = rotate(torch.eye(width, dtype=torch.float64), rotation)
    torch.testing.assert_close(applied @ applied.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = torch.block_diag(*[hadamard_matrix(block).double().T] * (width // block)) / block**0.5
    torch.testing.assert_close(applied, expected, rtol=0, atol=1e-12)


FAMILIES_AND_BLOCKS = [
    *(Rotation(size, block) for size, block in ((5120, 5120), (96, 96), (4096, 4096), (72, 24), (1, 1))),
    Rotation(5120, 5120, "fast-hadamard-transform"),
]


@pytest.mark.parametrize("rotation", FAMILIES_AND_BLOCKS)
def test_two_products_are_the_rotation(rotation: Rotation) -> None:
    """What a GPU does, and any device can."""
    x = torch.randn(2, 3, rotation.size)
    turned = rotate_on_a_gpu(x, rotation, Site("out", Layout(("channel",), (rotation.size,))))
    torch.testing.assert_close(turned, rotate(x.double(), rotation).float(), rtol=1e-5, atol=1e-5)


def test_float32_keeps_the_length_of_long_vectors() -> None:
    for width in WIDTHS:
        x = torch.randn(4, width)
        ratio = rotate(x, Rotation.of_size(width)).norm(dim=-1) / x.norm(dim=-1)
        assert (ratio - 1).abs().max() <= 1e-5


def test_an_outlier_is_spread_evenly_and_lands() -> None:
    x = torch.zeros(1, 1, 64)
    x[..., 17] = 127.0 * 8 * 0.5
    site = Site("out", Layout(("channel",), (64,)), QuantSpec(bits=8), torch.tensor(0.5), mode="integer")
    with use_backend("ref"):
        landed = hadamard(x, Rotation.of_size(64), site)
    assert landed.data.dtype == torch.int8
    assert torch.equal(landed.data.abs(), torch.full((1, 1, 64), 127, dtype=torch.int8))
    with use_backend("ref"):
        assert torch.equal(hadamard(x, None, Site("out", site.layout)), x)
