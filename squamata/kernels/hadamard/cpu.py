"""CPU: each row is transformed, normalised and landed while it lies in the first-level cache."""

from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange, types
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.butterflies import LINE, transform_lines
from squamata.kernels.hadamard.matrices import base_matrix
from squamata.kernels.landing import FLOAT, array, landing, read_row, readable, source, write_whole_row
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


def accepts(y: Tensor, rotation: Rotation | None, out: Site) -> bool:
    return readable(y) and 0 not in y.shape and (rotation is not None or out.static)


def run(y: Tensor, rotation: Rotation | None, out: Site) -> Value:
    where = landing(out, *y.shape, per_token=True)
    rows = y.shape[:-1].numel()
    power, base = (1, base_matrix(1)) if rotation is None else (rotation.parts[1], rotation.base)
    scale = 1.0 if rotation is None else rotation.block**-0.5
    parts = min(rows, 4 * numba.get_num_threads())
    _rotate_rows(source(y), array(base), power, np.float32(scale), where.target, rows, parts)
    return where.value()


@njit(cache=True, nogil=True, parallel=True)
def _rotate_rows(y, base, power, scale, target, rows, parts):  # type: ignore[no-untyped-def]
    features = max(target.codes.shape[1], target.values.shape[1])
    for part in prange(parts):
        buffer, room = np.empty(features, np.float32), np.empty(base.shape[0] * power, np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            x = target.values[row] if target.rounding == FLOAT else buffer
            read_row(y, row, 0, x)
            _rotate_row(x, base, power, scale, room)
            if target.rounding != FLOAT:
                write_whole_row(target, row, x)


@njit(cache=True, nogil=True)
def _rotate_row(x, base, power, scale, room):  # type: ignore[no-untyped-def]
    """Every block of a row in place; ``room`` has the size of a block."""
    block = room.size
    if block == 1:
        return
    for start in range(0, x.size, power):
        _walsh_hadamard(x[start : start + power])
    if base.shape[0] > 1:
        for start in range(0, x.size, block):
            _multiply_base(x[start : start + block], base, power, room)
    for c in range(x.size):
        x[c] *= scale


@njit(cache=True, nogil=True)
def _walsh_hadamard(x):  # type: ignore[no-untyped-def]
    """In place x H_n, n = x.size a power of two, by butterflies of growing width."""
    width = 1
    if x.size >= LINE:
        transform_lines(types.int64(x.ctypes.data), types.int64(x.size // LINE))
        width = LINE
    while width < x.size:
        for start in range(0, x.size, 2 * width):
            left, right = x[start : start + width], x[start + width : start + 2 * width]
            for c in range(width):
                a, b = left[c], right[c]
                left[c], right[c] = a + b, a - b
        width *= 2


@njit(cache=True, nogil=True)
def _multiply_base(x, base, power, room):  # type: ignore[no-untyped-def]
    """In place H_m x, x seen as (m, power)."""
    order = base.shape[0]
    for i in range(order):
        out = room[i * power : (i + 1) * power]
        for j in range(order):
            sign, part = base[i, j], x[j * power : (j + 1) * power]
            if j == 0:
                for c in range(power):
                    out[c] = sign * part[c]
            else:
                for c in range(power):
                    out[c] = out[c] + sign * part[c]
    for c in range(x.size):
        x[c] = room[c]
