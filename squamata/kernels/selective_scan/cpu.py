"""CPU: blocks of channels, each through all tokens in tiles that stay in the first-level cache.

Within a tile everything element-wise (dequantization, softplus, gate, rounding) is a numba loop over a row of
channels; the recurrence itself is ``strip.advance``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange, types
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from squamata.kernels import simd
from squamata.kernels.landing import Source, Target, array, landing, plain, read_row, readable, source, write_row
from squamata.kernels.lanes import prefetch_lines
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.selective_scan.strip import LANES, LOG2_E, TOGETHER, advance
from squamata.kernels.site import Site

WIDTH = 8 * LANES  # channels of a block
TILE = 16  # tokens of a tile
_LOG2_E = np.float32(LOG2_E)


class _Arrays(NamedTuple):
    """B and C (B x L, N), parameters, and the state (B, E, N) ``before`` and ``after``; all float32."""

    B: NDArray[np.float32]
    C: NDArray[np.float32]
    A: NDArray[np.float32]
    D: NDArray[np.float32]
    bias: NDArray[np.float32]
    before: NDArray[np.float32]
    after: NDArray[np.float32]


class _Scan(NamedTuple):
    """Everything a block reads and writes; numba does not pass nested tuples to threads, so they are made there."""

    u: Source
    dt: Source
    z: Source
    arrays: _Arrays
    target: Target


class _Tile(NamedTuple):
    """Working memory of a block, float32: A and state (strips, states, 16); the rest (TILE x WIDTH,)."""

    a: NDArray[np.float32]
    state: NDArray[np.float32]
    u: NDArray[np.float32]
    dt: NDArray[np.float32]
    input: NDArray[np.float32]
    y: NDArray[np.float32]
    z: NDArray[np.float32]


def accepts(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, z: Value, dt_bias: Tensor, state: Tensor, out: Site
) -> bool:
    return all(readable(value) for value in (u, dt, B, C, z)) and all(plain(x) for x in (A, D, dt_bias, state))


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, z: Value, dt_bias: Tensor, state: Tensor, out: Site
) -> tuple[Value, Tensor]:
    batch, length, channels = u.shape
    where = landing(out, batch, length, channels)
    after = torch.empty(state.shape, dtype=torch.float32)
    missing = -A.shape[1] % TOGETHER
    padded = (pad(as_float(value), (0, missing)) if missing else as_float(value) for value in (B, C))
    B_rows, C_rows = (array(value).reshape(batch * length, A.shape[1] + missing) for value in padded)
    arrays = _Arrays(B_rows, C_rows, array(A), array(D), array(dt_bias), array(state), after.numpy())
    _scan(source(u), source(dt), source(z), arrays, where.target, batch, length)
    return where.value(), after


@njit(cache=True, nogil=True, parallel=True)
def _scan(u, dt, z, arrays, target, batch, length):  # type: ignore[no-untyped-def]
    blocks = (arrays.A.shape[0] + WIDTH - 1) // WIDTH
    for task in prange(batch * blocks):
        _scan_block(u, dt, z, arrays, target, length, task // blocks, task % blocks * WIDTH)


@njit(cache=True, nogil=True)
def _scan_block(u, dt, z, arrays, target, length, sample, first):  # type: ignore[no-untyped-def]
    """All tokens of one sample for the channels from ``first`` on."""
    scan = _Scan(u, dt, z, arrays, target)
    width = min(WIDTH, arrays.A.shape[0] - first)
    states = arrays.B.shape[1]
    buffers = np.zeros((5, TILE * WIDTH), np.float32)
    strips = np.zeros((2, WIDTH // LANES, states, LANES), np.float32)
    tile = _Tile(strips[0], strips[1], buffers[0], buffers[1], buffers[2], buffers[3], buffers[4])
    _load_strips(arrays, tile, sample, first, width)
    for start in range(0, length, TILE):
        tokens = min(TILE, length - start)
        row = sample * length + start
        coming = min(TILE, length - start - tokens)
        for origin in (scan.u, scan.dt, scan.z):
            _fetch(origin, row + tokens, coming, first, width)
        _prepare(scan, tile, row, tokens, first, width)
        b, c = arrays.B[row:].ctypes.data, arrays.C[row:].ctypes.data
        for strip in range((width + LANES - 1) // LANES):
            _advance(tile, strip, b, c, tokens, states)
        _finish(scan, tile, row, tokens, first, width)
    for c in range(width):
        for n in range(arrays.A.shape[1]):
            arrays.after[sample, first + c, n] = tile.state[c // LANES, n, c % LANES]


@njit(cache=True, nogil=True)
def _advance(tile, strip, b, c, tokens, states):  # type: ignore[no-untyped-def]
    shift = strip * LANES
    advance(
        types.int64(tile.state[strip].ctypes.data),
        types.int64(tile.a[strip].ctypes.data),
        types.int64(tile.dt[shift:].ctypes.data),
        types.int64(tile.input[shift:].ctypes.data),
        types.int64(tile.y[shift:].ctypes.data),
        types.int64(b),
        types.int64(c),
        types.int64(tokens),
        types.int64(states),
        types.int64(4 * WIDTH),
    )


@njit(cache=True, nogil=True)
def _fetch(origin, row, tokens, first, width):  # type: ignore[no-untyped-def]
    """Ask for the float32 rows of the next tile: half a kilobyte here and there, which no hardware foresees."""
    if origin.values.size:
        row_bytes = 4 * origin.values.shape[1]
        where = types.int64(origin.values.ctypes.data) + row * row_bytes + 4 * first
        for t in range(tokens):
            prefetch_lines(types.int64(where + t * row_bytes), types.int64((width + LANES - 1) // LANES))


@njit(cache=True, nogil=True)
def _load_strips(arrays, tile, sample, first, width):  # type: ignore[no-untyped-def]
    """A, for exponentials of base two, and the initial state, channels side by side."""
    for c in range(width):
        for n in range(arrays.A.shape[1]):
            tile.a[c // LANES, n, c % LANES] = arrays.A[first + c, n] * _LOG2_E
            tile.state[c // LANES, n, c % LANES] = arrays.before[sample, first + c, n]


@njit(cache=True, nogil=True)
def _prepare(scan, tile, row, tokens, first, width):  # type: ignore[no-untyped-def]
    """Dequantized u and z, dt' = softplus(dt + bias), dt' u, and y = 0 for the tokens of a tile."""
    bias = scan.arrays.bias[first : first + width]
    for t in range(tokens):
        start, stop = t * WIDTH, t * WIDTH + width
        read_row(scan.u, row + t, first, tile.u[start:stop])
        read_row(scan.z, row + t, first, tile.z[start:stop])
        dt = tile.dt[start:stop]
        read_row(scan.dt, row + t, first, dt)
        for c in range(width):
            dt[c] += bias[c]
    for i in range(tokens * WIDTH):
        tile.dt[i] = simd.softplus(tile.dt[i])
    for i in range(tokens * WIDTH):
        tile.input[i] = tile.dt[i] * tile.u[i]
        tile.y[i] = types.float32(0.0)


@njit(cache=True, nogil=True)
def _finish(scan, tile, row, tokens, first, width):  # type: ignore[no-untyped-def]
    """(y + D u) SiLU(z), landed."""
    skip = scan.arrays.D[first : first + width]
    for i in range(tokens * WIDTH):
        tile.z[i] = simd.silu(tile.z[i])
    for t in range(tokens):
        start, stop = t * WIDTH, t * WIDTH + width
        y, u, gate = tile.y[start:stop], tile.u[start:stop], tile.z[start:stop]
        for c in range(width):
            y[c] = (y[c] + skip[c] * u[c]) * gate[c]
        write_row(scan.target, row + t, first, y)
