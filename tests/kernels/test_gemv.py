"""Matrix-vector products: integers exact on odd shapes with and without VNNI, floats close to float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from squamata.kernels import packing
from squamata.kernels.gemv import gemv

SHAPES = [(80, 48), (17, 130), (16, 16), (3, 5), (33, 1000)]
RNG = np.random.default_rng(0)


def random_case(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    q = RNG.integers(-128, 128, (rows, columns)).astype(np.int8)
    x = RNG.integers(-128, 128, columns).astype(np.int8)
    return q, x, RNG.random(rows).astype(np.float32), RNG.standard_normal(rows).astype(np.float32)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int8_is_exact(rows: int, columns: int, portable: bool) -> None:
    q, x, scale, bias = random_case(rows, columns)
    exact = (q.astype(np.int64) @ x.astype(np.int64)).astype(np.float32)
    got = gemv(packing.tile_int8(q, scale, bias), x, 0.3, portable)
    assert np.array_equal(got, exact * (np.float32(0.3) * scale) + bias)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int4_groups_are_exact_and_in_order(rows: int, columns: int, group: int, portable: bool) -> None:
    _, x, _, bias = random_case(rows, columns)
    q = RNG.integers(-8, 8, (rows, columns)).astype(np.int8)
    groups = -(-columns // group)
    scale = RNG.random((rows, groups)).astype(np.float32)
    expected = np.zeros(rows, np.float32)
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        expected += (q[:, part].astype(np.int64) @ x[part].astype(np.int64)).astype(np.float32) * scale[:, g]
    got = gemv(packing.tile_int4(q, scale, bias, group=group), x, 0.3, portable)
    assert np.array_equal(got, expected * np.float32(0.3) + bias)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int4_with_a_scale_per_row(rows: int, columns: int) -> None:
    _, x, scale, _ = random_case(rows, columns)
    q = RNG.integers(-8, 8, (rows, columns)).astype(np.int8)
    exact = (q.astype(np.int64) @ x.astype(np.int64)).astype(np.float32)
    assert np.array_equal(gemv(packing.tile_int4(q, scale), x, 0.3), exact * (np.float32(0.3) * scale))


@pytest.mark.parametrize(
    ("kind", "portable"), [("float32", False), ("bfloat16", False), ("int8", False), ("int4", False), ("int4", True)]
)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_float_activations(rows: int, columns: int, kind: str, portable: bool) -> None:
    q, _, scale, bias = random_case(rows, columns)
    x = RNG.standard_normal(columns).astype(np.float32)
    if kind == "float32":
        weight = RNG.standard_normal((rows, columns)).astype(np.float32)
        packed = packing.tile_float32(weight, bias)
    elif kind == "bfloat16":
        halves = torch.randn(rows, columns).bfloat16()
        weight, packed = halves.float().numpy(), packing.tile_bfloat16(halves.view(torch.uint16).numpy(), bias)
    elif kind == "int8":
        weight, packed = q * scale[:, None], packing.tile_int8(q, scale, bias, integer_activations=False)
    else:
        q = q >> 4
        weight, packed = q * scale[:, None], packing.tile_int4(q, scale, bias, integer_activations=False)
    exact = weight.astype(np.float64) @ x + bias
    np.testing.assert_allclose(
        gemv(packed, x, portable=portable), exact, rtol=1e-5, atol=1e-5 * np.abs(weight).max() * columns**0.5
    )


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(200, 32), (384, 128), (4096, None), (8200, None), (12288, 6144)])
def test_int4_by_float_activations_of_sixteen_bits(columns: int, group: int | None, portable: bool) -> None:
    rows, width = 19, group or columns
    q = RNG.integers(-8, 8, (rows, columns)).astype(np.int8)
    q[0], q[1] = -8, 7
    x = (RNG.standard_normal(columns) * 10.0 ** RNG.integers(-3, 3, columns)).astype(np.float32)
    scale = RNG.random((rows, -(-columns // width)) if group else rows).astype(np.float32)
    weight = q * (scale.repeat(width, axis=1)[:, :columns] if group else scale[:, None]).astype(np.float64)
    packed = packing.tile_int4(q, scale, integer_activations=False, group=group, sixteen_bits=True)
    own = packed.group_lines * 8  # no longer than what int32 can sum
    assert own <= packing.WIDEST_SPLIT and own >= min(width, packing.WIDEST_SPLIT // 2)
    for values in (x, np.ones_like(x), np.zeros_like(x)):  # ones: the largest sums
        padded = np.pad(values, (0, -columns % own)).reshape(-1, own)
        steps = np.abs(padded).max(1).repeat(own)[:columns] / 32639
        bound = 0.5001 * np.abs(weight) @ steps + 1e-6 * np.abs(weight) @ np.abs(values)
        assert (np.abs(gemv(packed, values, portable=portable) - weight @ values) <= bound).all()


def test_int4_keeps_what_is_not_finite() -> None:
    x = RNG.standard_normal(256).astype(np.float32)
    x[130] = np.nan
    q = RNG.integers(-8, 8, (20, 256)).astype(np.int8)
    assert np.isnan(gemv(packing.tile_int4(q, np.ones(20, np.float32), None, False, sixteen_bits=True), x)).all()


@pytest.mark.parametrize("columns", [1, 7, 128])
def test_canonical_int4_is_low_nibble_first(columns: int) -> None:
    q = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
    assert torch.equal(packing.unpack_int4(packing.pack_int4(q), columns), q)
    assert packing.pack_int4(torch.tensor([[1, -1]], dtype=torch.int8)).tolist() == [[0xF1]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        packing.tile_int4(np.zeros((4, 48), np.int8), np.ones((4, 3), np.float32), group=16)
    with pytest.raises(ValueError, match="int8"):
        gemv(packing.tile_int8(np.zeros((4, 8), np.int8)), np.zeros(8, np.float32))


def test_memory_is_zeroed_aligned_and_apart() -> None:
    arrays = [packing.allocate(count, np.uint32) for count in (1, 5000, 3, packing.ARENA_BYTES // 4, 7)]
    for array in arrays:
        assert not array.any() and array.ctypes.data % packing.PAGE == 0
        array[:] = 1 + id(array) % 1000
    for array in arrays:
        assert (array == 1 + id(array) % 1000).all()
