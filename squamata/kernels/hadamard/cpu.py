"""CPU: each row is transformed, normalised and landed while it lies in the first-level cache."""

from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange, types
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.butterflies import rotate
from squamata.kernels.hadamard.matrices import base_matrix
from squamata.kernels.landing import array, landing, read_row, readable, source, write_whole_row
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
        buffer, room = np.empty(features, np.float32), np.empty(features, np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            read_row(y, row, 0, buffer)
            write_whole_row(target, row, _rotated(buffer, room, base, power, scale))


@njit(cache=True, nogil=True)
def _rotated(x, room, base, power, scale):  # type: ignore[no-untyped-def]
    """The rotated row, in one of the two; a block of one is left alone."""
    order = types.int64(base.shape[0])
    if order * power == 1:
        return x
    first, second, matrix = types.int64(x.ctypes.data), types.int64(room.ctypes.data), types.int64(base.ctypes.data)
    where = rotate(first, second, types.int64(x.size), matrix, order, types.int64(power), scale)
    return x if where == first else room
