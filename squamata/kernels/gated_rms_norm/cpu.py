"""CPU: gate, norm in groups and landing in one pass over each row."""

from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange
from torch import Tensor

from squamata.kernels import simd
from squamata.kernels.landing import array, landing, plain, read_row, readable, source, write_whole_row
from squamata.kernels.qtensor import Value
from squamata.kernels.rms_norm.cpu import normalize_row
from squamata.kernels.site import Site


def accepts(y: Tensor, z: Value, weight: Tensor, epsilon: float, groups: int, out: Site) -> bool:
    return plain(y) and readable(z) and plain(weight) and y.numel() > 0


def run(y: Tensor, z: Value, weight: Tensor, epsilon: float, groups: int, out: Site) -> Value:
    where = landing(out, *y.shape, per_token=True)
    rows = array(y).reshape(-1, y.shape[-1])
    parts = min(len(rows), 4 * numba.get_num_threads())
    _gate_and_norm(rows, source(z), array(weight), np.float32(epsilon), groups, where.target, parts)
    return where.value()


@njit(cache=True, nogil=True, parallel=True)
def _gate_and_norm(y, gate, weight, epsilon, groups, target, parts):  # type: ignore[no-untyped-def]
    rows, features = y.shape
    for part in prange(parts):
        x, z = np.empty(features, np.float32), np.empty(features, np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            _norm_row(y[row], gate, row, x, z, weight, epsilon, groups)
            write_whole_row(target, row, x)


@njit(cache=True, nogil=True)
def _norm_row(y, gate, row, x, z, weight, epsilon, groups):  # type: ignore[no-untyped-def]
    """``x`` = norm(y SiLU(z)) * weight; ``z`` is room for the gate."""
    size = x.size // groups
    read_row(gate, row, 0, z)
    for c in range(x.size):
        x[c] = y[c] * simd.silu(z[c])
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        normalize_row(x[start:stop], weight[start:stop], epsilon)
