"""CPU: rows of 4 + 1 bit codes, packed as ``packing`` says: written from float32 and read back in registers."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange, types
from torch import Tensor

from squamata.kernels import simd
from squamata.kernels.grid import Grid

TOP = np.float32(7)  # largest value of either grid


def packed_rows(x: Tensor, grid: Grid, rounding: int) -> Tensor:
    """float32 (..., K) -> uint8 (..., ceil(K / 2) + ceil(K / 8)): ``levels.encode`` and ``pack_flagged`` in one pass.

    ``grid``: one number each, or one a feature. ``rounding``: 0 half-even, 1 half-away, 2 towards zero.
    """
    features = x.shape[-1]
    out = torch.empty((*x.shape[:-1], (features + 1) // 2 + (features + 7) // 8), dtype=torch.uint8)
    assert grid.second is not None
    scale, inverse, coarse = (
        part.float().reshape(-1).expand(features).contiguous().numpy() for part in grid if part is not None
    )
    rows = x.detach().contiguous().numpy().reshape(-1, features)
    _write_rows(rows, scale, inverse, coarse, rounding, out.numpy().reshape(-1, out.shape[-1]))
    return out


@njit(cache=True, nogil=True, parallel=True)
def _write_rows(x, scale, inverse, coarse, rounding, out):  # type: ignore[no-untyped-def]
    for row in prange(x.shape[0]):
        _write_row(x[row], scale, inverse, coarse, rounding, out[row])


@njit(cache=True, nogil=True)
def _write_row(x, scale, inverse, coarse, rounding, out):  # type: ignore[no-untyped-def]
    codes = np.empty(x.size, np.int32)  # value in the low four bits, flag in the fifth
    for c in range(x.size):
        size = abs(x[c])
        fine = min(_round(size * inverse[c], rounding), TOP)
        flagged = min(_round(simd.divide(size, coarse[c]), rounding), TOP)
        nearer = abs(flagged * coarse[c] - size) < abs(fine * scale[c] - size) and flagged > types.float32(0.0)
        value = types.int32(flagged if nearer else fine)
        value = -value if x[c] < types.float32(0.0) else value
        codes[c] = (value & 15) | (16 if nearer else 0)
    flags = (x.size + 1) // 2
    for place in range(out.size):
        out[place] = 0
    for c in range(x.size):
        out[c >> 1] |= types.uint8((codes[c] & 15) << (4 * (c & 1)))
        out[flags + (c >> 3)] |= types.uint8((codes[c] >> 4) << (c & 7))


@njit(cache=True, nogil=True)
def _round(y, rounding):  # type: ignore[no-untyped-def]
    """Of what is not negative, as ``grid.round_codes``."""
    if rounding == 0:
        return simd.rint(y)
    return simd.truncate(y + types.float32(0.5)) if rounding == 1 else simd.truncate(y)


@njit(cache=True, nogil=True)
def read_packed_row(packed, row, first, fine, coarse, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the features ``first`` .. of a packed row; ``fine``, ``coarse``: steps of all features.

    Indices are unsigned, which numba does not test for a sign, and nothing is sliced: slices cost more than the work.
    """
    one, two, eight, start = np.uint64(1), np.uint64(2), np.uint64(8), np.uint64(first)
    values, flags = start // two, np.uint64((fine.size + 1) // 2) + start // eight
    whole = np.uint64(out.size // 8 if first % 8 == 0 else 0)
    for pair in range(whole * np.uint64(4)):
        byte = types.int32(packed[row, values + pair])
        out[two * pair] = types.float32(((byte & 15) ^ 8) - 8)
        out[two * pair + one] = types.float32(((byte >> 4) ^ 8) - 8)
    for block in range(whole):
        flag = types.int32(packed[row, flags + block])
        for k in range(eight):
            c = eight * block + k
            out[c] *= coarse[start + c] if flag & (1 << types.int32(k)) else fine[start + c]
    for c in range(eight * whole, np.uint64(out.size)):
        _read_one(packed, row, start + c, c, fine, coarse, out)


@njit(cache=True, nogil=True)
def _read_one(packed, row, place, c, fine, coarse, out):  # type: ignore[no-untyped-def]
    nibble = (types.int32(packed[row, place // np.uint64(2)]) >> types.int32(4 * (place % np.uint64(2)))) & 15
    byte = types.int32(packed[row, np.uint64((fine.size + 1) // 2) + place // np.uint64(8)])
    step = coarse[place] if (byte >> types.int32(place % np.uint64(8))) & 1 else fine[place]
    out[c] = types.float32((nibble ^ 8) - 8) * step
