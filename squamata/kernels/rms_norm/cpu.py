"""CPU: residual add, norm and landing in one pass over each row."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange, types
from torch import Tensor

from squamata.kernels import simd
from squamata.kernels.landing import array, landing, plain, write_whole_row
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


def accepts(h: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, out: Site) -> bool:
    return plain(h) and plain(residual) and plain(weight) and h.numel() > 0


def run(h: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, out: Site) -> tuple[Value, Tensor]:
    features = h.shape[-1]
    where = landing(out, *h.shape, per_token=True)
    total = h if residual is None else torch.empty(h.shape, dtype=torch.float32)
    rows = array(h).reshape(-1, features)
    parts = min(len(rows), 4 * numba.get_num_threads())
    before = rows[:0] if residual is None else array(residual).reshape(-1, features)
    after = rows if residual is None else total.numpy().reshape(-1, features)
    _norm_rows(rows, before, after, array(weight), np.float32(epsilon), where.target, parts)
    return where.value(), total


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def mean_square(x):  # type: ignore[no-untyped-def]
    """Mean of the squares."""
    total = types.float32(0.0)
    for c in range(x.size):
        total += x[c] * x[c]
    return simd.divide(total, types.float32(x.size))


@njit(cache=True, nogil=True)
def normalize_row(x, weight, epsilon):  # type: ignore[no-untyped-def]
    """In place ``x / sqrt(mean(x^2) + epsilon) * weight``."""
    inverse = simd.divide(types.float32(1.0), simd.sqrt(mean_square(x) + epsilon))
    for c in range(x.size):
        x[c] = x[c] * inverse * weight[c]


@njit(cache=True, nogil=True)
def _add_residual(row, x, h, before, after):  # type: ignore[no-untyped-def]
    """The new residual of one row, into ``x`` and ``after``; there is none if ``before`` is empty."""
    entering = h[row]
    if before.size:
        old, new = before[row], after[row]
        for c in range(x.size):
            x[c] = old[c] + entering[c]
        for c in range(x.size):
            new[c] = x[c]
    else:
        for c in range(x.size):
            x[c] = entering[c]


@njit(cache=True, nogil=True, parallel=True)
def _norm_rows(h, before, after, weight, epsilon, target, parts):  # type: ignore[no-untyped-def]
    rows, features = h.shape
    for part in prange(parts):
        x = np.empty(features, np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            _add_residual(row, x, h, before, after)
            normalize_row(x, weight, epsilon)
            write_whole_row(target, row, x)
