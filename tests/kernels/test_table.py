"""Weights whose rows bring their own levels, and the sparse rest: bytes, values, and what is nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squamata.kernels.codec import CODECS, Grid
from squamata.kernels.linear import Linear, linear, table
from squamata.kernels.packing import pack_int4, pack_stream, unpack_stream
from squamata.kernels.qtensor import QTensor, join_rows
from squamata.kernels.sparse import SparseRows, column_type
from squamata.spec.quant import QuantSpec


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99))
def test_a_stream_of_codes_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_stream(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, bits * -(-columns // 8))
    assert torch.equal(unpack_stream(packed, bits, columns), codes)
    for row in range(rows):  # one number of many bits, code 0 lowest
        whole = sum(int(code) << bits * place for place, code in enumerate(codes[row]))
        assert whole == int.from_bytes(bytes(packed[row].tolist()), "little")


def test_of_four_bits_it_is_the_nibbles_of_int4() -> None:
    codes = torch.arange(16, dtype=torch.int8).reshape(2, 8)
    assert torch.equal(pack_stream(codes, 4), pack_int4(codes))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_nearest_level_of_the_row_is_taken(bits: int) -> None:
    spec = QuantSpec(bits=bits, codec="table", granularity="channel")
    table, x = drawn(5, 2**bits).sort(-1).values, 2 * drawn(5, 40, seed=1)
    codes = CODECS["table"].encode(x, Grid.of(table), spec).long()
    distances = (x[:, :, None] - table[:, None]).abs()
    assert torch.equal(torch.gather(distances, 2, codes[..., None])[..., 0], distances.amin(-1))
    outside = CODECS["table"].beyond(x, Grid.of(table), spec)
    assert torch.equal(outside, (x < table.amin(1, True)) | (x > table.amax(1, True)))


def test_a_weight_is_its_tables_and_the_sparse_rest() -> None:
    spec = QuantSpec(bits=3, codec="table", granularity="channel", sparse=0.1)
    codes = torch.randint(8, (4, 11), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    table, rest = drawn(4, 8), drawn(4, 11, seed=3)
    chosen = torch.rand(4, 11, generator=torch.Generator().manual_seed(4)) < 0.3
    chosen[2] = False
    sparse = SparseRows.of(rest, chosen)
    weight = QTensor(pack_stream(codes, 3), table, spec, None, 11, sparse)
    values = weight.dequantize()
    for row in range(4):
        for column in range(11):
            expected = table[row, int(codes[row, column])]
            if chosen[row, column]:
                expected = expected + rest[row, column].half()
            assert values[row, column] == expected
    assert weight.shape == (4, 11) and weight.nbytes == 4 * 6 + 4 * 8 * 4 + 5 * 4 + int(chosen.sum()) * (2 + 2)
    assert sparse.pointers.tolist() == [0, *chosen.sum(1).cumsum(0).tolist()]
    assert torch.equal(weight.to("cpu").dequantize(torch.float64).float(), values)
    assert torch.equal(join_rows([weight]).dequantize(), values)


def test_wide_matrices_number_their_columns_in_32_bits() -> None:
    assert column_type(2**15) == torch.int16 and column_type(2**15 + 1) == torch.int32
    chosen = torch.zeros(1, 2**15, dtype=torch.bool)
    chosen[0, -1] = True
    ones = torch.ones(1, 2**15)
    assert torch.equal(SparseRows.of(ones, chosen).added_to(torch.zeros_like(ones)), chosen.float())


def weight_of(bits: int, rows: int, columns: int, share: float) -> QTensor:
    spec = QuantSpec(bits=bits, codec="table", granularity="channel", sparse=share)
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    chosen = torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)) < share
    sparse = SparseRows.of(drawn(rows, columns, seed=3), chosen) if share else None
    return QTensor(pack_stream(codes, bits), drawn(rows, 2**bits), spec, None, columns, sparse)


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (16, 8), (37, 133)])
def test_the_cpus_rows_are_the_references_and_so_are_its_products(
    rows: int, columns: int, bits: int, share: float
) -> None:
    weight = weight_of(bits, rows, columns, share)
    assert torch.equal(table.expanded(weight), weight.dequantize())
    for tokens in (1, 3, table.FEW, table.FEW + 1):
        x, bias = drawn(1, tokens, columns, seed=9), drawn(rows, seed=8)
        layer = Linear(weight, bias, (rows - rows // 2, rows // 2) if rows > 1 else ())
        parts = [None] * len(layer.rows)
        exact = torch.cat([part.double() for part in linear(x.double(), layer, parts, backend="ref")], -1)
        values = torch.cat(linear(x, layer, parts, backend="cpu"), -1)
        assert values.shape == (1, tokens, rows)
        torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5 * columns**0.5)
