"""CPU: products with weights whose rows bring tables. A row is expanded where it is used, and never twice in a call.

An expanded row is to the last bit what ``QTensor.dequantize`` says; only the order in which a product is summed differs
from the reference's.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numpy.typing import NDArray
from torch import Tensor

from squamata.kernels.landing import array
from squamata.kernels.qtensor import QTensor

FEW = 8  # rows of activations up to which no expanded weight is kept


def expanded(weight: QTensor) -> Tensor:
    """Values (N, K) as float32."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float32)
    _expand(array(weight.data), array(weight.scale), _sparse(weight), weight.spec.bits, values.numpy())
    return values


def product(x: Tensor, weight: QTensor) -> Tensor:
    """x W^T of few rows: (..., K) float32 -> (..., N)."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(len(rows), weight.shape[0], dtype=torch.float32)
    parts = min(weight.shape[0], 4 * numba.get_num_threads())
    codes, bits = array(weight.data), weight.spec.bits
    _multiply(array(rows), codes, array(weight.scale), _sparse(weight), bits, parts, y.numpy())
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _sparse(weight: QTensor) -> tuple[NDArray, NDArray, NDArray]:
    """Row pointers, columns and float32 values of what is added; without a sparse part, rows of nothing."""
    if (sparse := weight.sparse) is None:
        nothing = np.zeros(0, np.int32)
        return np.zeros(weight.shape[0] + 1, np.int32), nothing, np.zeros(0, np.float32)
    return array(sparse.pointers), array(sparse.columns.int()), array(sparse.values.float())


@njit(cache=True, nogil=True)
def _expand_row(packed, table, sparse, row, bits, out):  # type: ignore[no-untyped-def]
    """One row, ``out`` (K,); eight codes at a time make ``bits`` bytes."""
    mask, whole = types.int64((1 << bits) - 1), out.size // 8
    for group in range(whole):
        word = types.int64(0)
        for number in range(bits):
            word |= types.int64(packed[group * bits + number]) << (8 * number)
        for place in range(8):
            out[8 * group + place] = table[(word >> (bits * place)) & mask]
    if 8 * whole < out.size:
        word = types.int64(0)
        for number in range(bits):
            word |= types.int64(packed[whole * bits + number]) << (8 * number)
        for place in range(out.size - 8 * whole):
            out[8 * whole + place] = table[(word >> (bits * place)) & mask]
    pointers, columns, values = sparse
    for number in range(pointers[row], pointers[row + 1]):
        out[columns[number]] += values[number]


@njit(cache=True, nogil=True, parallel=True)
def _expand(packed, table, sparse, bits, values):  # type: ignore[no-untyped-def]
    for row in prange(len(values)):
        _expand_row(packed[row], table[row], sparse, row, bits, values[row])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(row, x):  # type: ignore[no-untyped-def]
    total = types.float32(0)
    for k in range(row.size):
        total += row[k] * x[k]
    return total


@njit(cache=True, nogil=True, parallel=True)
def _multiply(x, packed, table, sparse, bits, parts, y):  # type: ignore[no-untyped-def]
    rows = len(packed)
    for part in prange(parts):
        buffer = np.empty(x.shape[1], np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            _expand_row(packed[row], table[row], sparse, row, bits, buffer)
            for token in range(len(x)):
                y[token, row] = _dot(buffer, x[token])
