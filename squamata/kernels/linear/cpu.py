"""CPU: int8 products by torch's oneDNN, and one pass that turns accumulators into what lands on each site.

``torch._int_mm`` has no requirement of alignment on the CPU, and takes the canonical (N, K) weight transposed at no
cost. Int4 weights in groups of 128 have a product of their own (``int4``); others are unpacked for each call: a copy
in int8 would double the memory of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear as matmul_transposed

from squamata.kernels import halves
from squamata.kernels.landing import FLOAT, Landing, array, landing, plain, readable, uniform, vector, write_whole_row
from squamata.kernels.linear import Linear, int4, table
from squamata.kernels.qtensor import QTensor, Value
from squamata.kernels.site import Site

ACCUMULATOR_BYTES = 4 << 20  # rows are taken in tiles whose accumulators fit in this
SMALLEST_TILE = 64  # rows: fewer would repack the weight too often
WIDE_ROWS = 512  # float rows that are split together; a multiple of int4.TOKENS


class _Factors(NamedTuple):
    """y = accumulator * (row * column) + bias; ``row`` (M,), ``column`` (N,), ``bias`` (N,) or empty."""

    row: NDArray[np.float32]
    column: NDArray[np.float32]
    bias: NDArray[np.float32]


def accepts(x: Value, layer: Linear, out: Sequence[Site | None]) -> bool:
    weight = layer.weight
    if not (readable(x) and plain(layer.bias) and isinstance(weight, QTensor) and readable(weight)) or 0 in x.shape:
        return False
    if weight.spec.tabulated:
        return isinstance(x, Tensor)
    if weight.second is not None or not weight.spec.linear_grid or not _by_row_or_group(weight):
        return False
    if not isinstance(x, QTensor):
        return True
    return uniform(x) and (x.scale.numel() == 1 or x.scale.shape == (*x.shape[:-1], 1)) and exact_int_mm()


def _by_row_or_group(weight: QTensor) -> bool:
    """True if a scale serves the whole weight, a row, or a group of a row."""
    rows, columns = weight.shape
    group = weight.spec.granularity.group
    groups = 1 if group is None else -(-columns // group)
    return weight.scale.ndim < 2 or (weight.scale.shape[0] in (1, rows) and weight.scale.shape[1] == groups)


def run(x: Value, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:
    weight, columns = layer.weight, x.shape[-1]
    assert isinstance(weight, QTensor)
    if isinstance(x, Tensor) and not layer.sixteen_bits:
        return _float_product(x, layer, out)
    if _nibbles_in_groups(weight):
        return _nibble_product(x, weight, layer, out)
    if isinstance(x, Tensor):
        return _wide_product(x, weight, layer, out) if _int8_rows(weight) else _float_product(x, layer, out)
    codes = x.data.reshape(-1, columns).contiguous()
    grouped = weight.spec.granularity.group is not None and weight.scale.ndim == 2
    matrix = unpacked(weight)
    tile = _tile_rows(len(codes), len(matrix))
    acc = torch.empty(tile, len(matrix), dtype=torch.int32)

    def product(start: int) -> NDArray:
        part = codes[start : start + tile]
        room = acc[: len(part)]
        if grouped:
            return _grouped_product(part, matrix, weight, room).numpy()
        return _integer_sums(part, matrix, room).numpy()

    factors = _factors(x.scale, torch.ones(()) if grouped else weight.scale, layer, len(codes))
    return _land_tiles(product, tile, factors, _landings(x, layer, out))


def _nibble_product(x: Value, weight: QTensor, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:
    """Straight from the packed codes; float rows become 16-bit integers (``halves``)."""
    scales = array(weight.scale.float().expand(weight.shape[0], -1))
    product = int4.GroupedProduct(array(weight.data), scales)
    if isinstance(x, Tensor):
        return _wide_nibble_product(x, product, layer, out)
    rows = array(x.data.reshape(-1, x.shape[-1]))
    tile = _tile_rows(len(rows), weight.shape[0])
    room = _padded(tile, weight.shape[0])

    def multiplied(start: int) -> NDArray:
        part = product.enter(rows[start : start + tile])
        product.multiply(part, room)
        return room[: part.filled, : weight.shape[0]]

    factors = _factors(x.scale, torch.ones(()), layer, len(rows))
    return _land_tiles(multiplied, tile, factors, _landings(x, layer, out))


def _wide_nibble_product(
    x: Tensor, product: int4.GroupedProduct, layer: Linear, out: Sequence[Site | None]
) -> tuple[Value, ...]:
    """Float rows: a segment that stays float is written where it stays, any other is landed by its site."""
    rows, first, values = array(x).reshape(-1, x.shape[-1]), 0, []
    wholes = [torch.from_numpy(_padded(len(rows), n)) for n in layer.rows]
    for start in range(0, len(rows), WIDE_ROWS):
        part, first = product.enter(rows[start : start + WIDE_ROWS]), 0
        for n, whole in zip(layer.rows, wholes, strict=True):
            product.multiply(part, whole.numpy()[start:], first)
            first += n
    first = 0
    for site, n, whole in zip(out, layer.rows, wholes, strict=True):
        y = whole[: len(rows), :n].contiguous()
        if layer.bias is not None:
            y += layer.bias[first : first + n]
        y = y.reshape(*x.shape[:-1], n)
        values.append(y if site is None else site.land(y))
        first += n
    return tuple(values)


def _padded(rows: int, features: int) -> NDArray[np.float32]:
    """Room for an output of ``int4``, in torch's memory: numpy asks for huge pages, which are zeroed at every call."""
    columns = -(-features // int4.ROWS) * int4.ROWS
    return torch.empty(int4.padded_rows(rows), columns, dtype=torch.float32).numpy()


def _int8_rows(weight: QTensor) -> bool:
    """True if an exact int8 product takes this weight, whose scales come after the sum."""
    return weight.length is None and weight.spec.granularity.group is None and exact_int_mm()


def _wide_product(x: Tensor, weight: QTensor, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:
    """Float rows as 16-bit integers with a step a row, whose high and low bytes are rows of one int8 product."""
    rows = x.reshape(-1, x.shape[-1])
    step = (rows.abs().amax(-1, keepdim=True) / halves.LARGEST).clamp_min(halves.LEAST_STEP)
    tile = _tile_rows(len(rows), 2 * weight.shape[0])

    def product(start: int) -> NDArray:
        whole = torch.round(rows[start : start + tile] / step[start : start + tile]).int()
        high = (whole + 128) >> 8
        both = torch.cat([high, whole - (high << 8)]).to(torch.int8)
        sums = _integer_sums(both, weight.data).float()
        return (256 * sums[: len(whole)] + sums[len(whole) :]).numpy()

    return _land_tiles(product, tile, _factors(step, weight.scale, layer, len(rows)), _landings(x, layer, out))


def _float_product(x: Value, layer: Linear, out: Sequence[Site | None]) -> tuple[Value, ...]:
    """Float rows by what no kernel here multiplies packed: the weight is expanded, once a call."""
    assert isinstance(x, Tensor) and isinstance(layer.weight, QTensor)
    if layer.weight.spec.tabulated and x.shape[:-1].numel() <= table.FEW:
        y = table.product(x, layer.weight)
        y = y if layer.bias is None else y + layer.bias
    else:
        y = matmul_transposed(x, dequantized(layer.weight), layer.bias)
    parts = y.split(layer.rows, dim=-1)
    return tuple(part if site is None else site.land(part) for part, site in zip(parts, out, strict=True))


def _tile_rows(rows: int, features: int) -> int:
    return min(rows, max(SMALLEST_TILE, ACCUMULATOR_BYTES // (4 * features)))


def _landings(x: Value, layer: Linear, out: Sequence[Site | None]) -> list[Landing]:
    return [landing(site, *x.shape[:-1], n, per_token=True) for site, n in zip(out, layer.rows, strict=True)]


def _factors(scale: Tensor, column: Tensor, layer: Linear, rows: int) -> _Factors:
    features = layer.weight.shape[0]
    bias = np.empty(0, np.float32) if layer.bias is None else vector(layer.bias, features)
    return _Factors(vector(scale.float().reshape(-1), rows), vector(column, features), bias)


def _land_tiles(
    product: Callable[[int], NDArray], tile: int, factors: _Factors, wheres: Sequence[Landing]
) -> tuple[Value, ...]:
    """``product(start)``: the accumulators (at most tile, N) of the rows from ``start`` on."""
    for start in range(0, len(factors.row), tile):
        _land(product(start), start, factors, wheres)
    return tuple(where.value() for where in wheres)


def _land(acc: NDArray, start: int, factors: _Factors, wheres: Sequence[Landing]) -> None:
    """Accumulators (rows, N) of the rows from ``start`` on, segment by segment onto the targets."""
    first = 0
    parts = min(len(acc), 4 * numba.get_num_threads())
    for where in wheres:
        _land_segment(acc, start, first, factors, where.target, parts)
        first += where.data.shape[-1]


def _nibbles_in_groups(weight: QTensor) -> bool:
    """True if ``int4.GroupedProduct`` takes this weight and the CPU has the instruction that makes it worth while."""
    whole = weight.shape[1] % int4.GROUP == 0 and weight.spec.granularity.group == int4.GROUP
    return whole and weight.length is not None and weight.scale.ndim == 2 and int4.VNNI


def _grouped_product(x: Tensor, weight: Tensor, quantized: QTensor, acc: Tensor) -> Tensor:
    """Sum over groups, in increasing order, of float32(accumulator) * scale of the group: (rows, N)."""
    group = quantized.spec.granularity.group
    total = torch.empty(len(x), len(weight), dtype=torch.float32)
    scales = array(quantized.scale.float().t())
    parts = min(len(x), 4 * numba.get_num_threads())
    pieces = zip(x.split(group, dim=-1), weight.split(group, dim=-1), strict=True)
    for index, (x_group, weight_group) in enumerate(pieces):
        _integer_sums(x_group.contiguous(), weight_group, acc)
        _add_group(acc.numpy(), scales[index], index == 0, total.numpy(), parts)
    return total


def _integer_sums(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T of int8 (M, K) and (N, K), as int32.

    The transpose of a single column has the strides of a column still, and torch then multiplies by something else.
    """
    transposed = weight.t() if weight.shape[1] > 1 else weight.reshape(1, -1)
    return torch._int_mm(x, transposed, out=out)


@cache
def exact_int_mm() -> bool:
    """Whether int8 products are exact here: some CPUs without the dot-product instruction saturate at 16 bits."""
    for a, b in ((-128, -128), (-128, 127), (127, -128), (127, 127)):
        x, w = torch.full((3, 70), a, dtype=torch.int8), torch.full((5, 70), b, dtype=torch.int8)
        if not bool((torch._int_mm(x, w.t()) == 70 * a * b).all()):
            return False
    return True


def unpacked(weight: QTensor) -> Tensor:
    """Codes (N, K) as int8."""
    if weight.length is None:
        return weight.data
    codes = torch.empty(weight.shape, dtype=torch.int8)
    _unpack(array(weight.data), codes.numpy())
    return codes


def dequantized(weight: QTensor) -> Tensor:
    """Values (N, K) as float32."""
    if weight.spec.tabulated:
        return table.expanded(weight)
    codes = unpacked(weight)
    rows, columns = codes.shape
    group = weight.spec.granularity.group if weight.scale.ndim == 2 and weight.scale.shape[1] > 1 else None
    scale = weight.scale.float()
    scale = scale.expand(rows, scale.shape[1]) if scale.ndim == 2 else scale.reshape(-1, 1).expand(rows, 1)
    values = torch.empty(rows, columns, dtype=torch.float32)
    _dequantize(array(codes), array(scale), group or columns, values.numpy())
    return values


@njit(cache=True, nogil=True, parallel=True)
def _unpack(packed, codes):  # type: ignore[no-untyped-def]
    """Two's complement nibbles, even column low, to int8."""
    rows, columns = codes.shape
    for row in prange(rows):
        pairs, out = packed[row], codes[row]
        for k in range(columns // 2):
            out[2 * k] = types.int8(types.int8(pairs[k] << 4) >> 4)
            out[2 * k + 1] = types.int8(types.int8(pairs[k]) >> 4)
        if columns % 2:
            out[columns - 1] = types.int8(types.int8(pairs[columns // 2] << 4) >> 4)


@njit(cache=True, nogil=True, parallel=True)
def _dequantize(codes, scale, group, values):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    for row in prange(rows):
        for index in range(scale.shape[1]):
            start, stop = index * group, min(columns, (index + 1) * group)
            out, integers = values[row, start:stop], codes[row, start:stop]
            for k in range(out.size):
                out[k] = types.float32(integers[k]) * scale[row, index]


@njit(cache=True, nogil=True, parallel=True)
def _add_group(acc, scale, begin, total, parts):  # type: ignore[no-untyped-def]
    rows, columns = acc.shape
    for part in prange(parts):
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            integers, out = acc[row], total[row]
            if begin:
                for n in range(columns):
                    out[n] = types.float32(integers[n]) * scale[n]
            else:
                for n in range(columns):
                    out[n] = out[n] + types.float32(integers[n]) * scale[n]


@njit(cache=True, nogil=True)
def _land_row(integers, row, first, factors, target, buffer):  # type: ignore[no-untyped-def]
    """One row of one segment, multiplied and added with separate roundings."""
    y = target.values[row] if target.rounding == FLOAT else buffer
    column = factors.column[first : first + y.size]
    own = factors.row[row]
    for n in range(y.size):
        y[n] = types.float32(integers[n]) * (own * column[n])
    if factors.bias.size:
        bias = factors.bias[first : first + y.size]
        for n in range(y.size):
            y[n] += bias[n]
    if target.rounding != FLOAT:
        write_whole_row(target, row, y)


@njit(cache=True, nogil=True, parallel=True)
def _land_segment(acc, start, first, factors, target, parts):  # type: ignore[no-untyped-def]
    """Columns ``first`` .. of the accumulators of the rows from ``start`` on, onto a target."""
    rows = acc.shape[0]
    features = max(target.codes.shape[1], target.values.shape[1])
    for part in prange(parts):
        buffer = np.empty(features, np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            _land_row(acc[row, first : first + features], start + row, first, factors, target, buffer)
