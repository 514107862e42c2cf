"""CPU: the chunked form, one head of one sample at a time, everything it needs in the cache; or the recurrence.

C B^T of every chunk, which the heads of a group share, is computed before by torch. A head then keeps its state
transposed, (N, P), so that all three of its products add rows of P channels.
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
from squamata.kernels.landing import array, plain, read_row, readable, source
from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan.ref import FORGOTTEN
from squamata.kernels.ssd_scan.tile import LANES, ROWS, add_product

CHUNK = 64  # tokens of a chunk
FEW = 4  # tokens up to which the recurrence is used
_ONE = np.float32(1.0)


class _Arrays(NamedTuple):
    """Parameters (H,), ``steps`` dt' (B L, H), the states (B, H, P, N) and y (B, L, H P); float32.

    ``B``, ``C``: (B, chunks, G, l, N), padded with zeros to whole chunks; ``scores``: C B^T, (B, chunks, G, l, l).
    """

    A: NDArray[np.float32]
    D: NDArray[np.float32]
    steps: NDArray[np.float32]
    B: NDArray[np.float32]
    C: NDArray[np.float32]
    scores: NDArray[np.float32]
    before: NDArray[np.float32]
    after: NDArray[np.float32]
    y: NDArray[np.float32]


class _Chunk(NamedTuple):
    """Working memory of a head, float32: l tokens by P channels (padded), but ``masked`` (l, l), ``state`` (N, P).

    ``u``: inputs; ``weighted``: dt' u, later decayed to the end of the chunk; ``log_decay`` (l,): the sum of dt' A from
    before the chunk; ``rest`` (l,): what float32 leaves of that sum, which grows with the chunk while only differences
    of it count; ``decay``, ``to_end`` (l,): exp of it, and of what is left of it at the end of the chunk.
    """

    state: NDArray[np.float32]
    masked: NDArray[np.float32]
    u: NDArray[np.float32]
    weighted: NDArray[np.float32]
    y: NDArray[np.float32]
    log_decay: NDArray[np.float32]
    rest: NDArray[np.float32]
    decay: NDArray[np.float32]
    to_end: NDArray[np.float32]


def accepts(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, dt_bias: Tensor, state: Tensor, layout: HeadLayout
) -> bool:
    tensors = all(plain(x) for x in (A, D, dt_bias, state))
    return tensors and all(readable(value) for value in (u, dt, B, C)) and 0 not in u.shape


def run(
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, dt_bias: Tensor, state: Tensor, layout: HeadLayout
) -> tuple[Tensor, Tensor]:
    length = u.shape[1]
    chunk = 1 if length <= FEW else min(CHUNK, length + -length % ROWS)
    B_chunks, C_chunks = (_in_chunks(as_float(value), layout, chunk) for value in (B, C))
    scores = C_chunks @ B_chunks.transpose(-1, -2) if chunk > 1 else C_chunks[:0]
    y, after = torch.empty(u.shape, dtype=torch.float32), torch.empty(state.shape, dtype=torch.float32)
    steps = torch.empty(u.shape[0] * length, layout.heads, dtype=torch.float32)
    low, high = (np.float32(limit) for limit in layout.time_step_limit)
    _time_steps(source(dt), array(dt_bias), low, high, steps.numpy())
    arrays = _Arrays(*(array(x) for x in (A, D, steps, B_chunks, C_chunks, scores, state, after, y)))
    _scan(source(u), arrays)
    return y, after


def _in_chunks(x: Tensor, layout: HeadLayout, chunk: int) -> Tensor:
    """(B, L, G N) -> (B, chunks, G, l, N), the last chunk and N (to a multiple of four) padded with zeros."""
    batch, length, _ = x.shape
    x = x.reshape(batch, length, layout.groups, layout.d_state)
    missing = 0 if chunk == 1 else -layout.d_state % ROWS
    x = pad(x, (0, missing, 0, 0, 0, -length % chunk))
    return x.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()


@njit(cache=True, nogil=True, parallel=True)
def _scan(u, arrays):  # type: ignore[no-untyped-def]
    batch, heads = arrays.before.shape[:2]
    for task in prange(batch * heads):
        if arrays.scores.size:
            _scan_head(u, arrays, task // heads, task % heads)
        else:
            _step_head(u, arrays, task // heads, task % heads)


@njit(cache=True, nogil=True)
def _time_steps(dt, bias, low, high, steps):  # type: ignore[no-untyped-def]
    """dt' = clamp(softplus(dt + bias)) of every token and head, (B L, H)."""
    for row in range(steps.shape[0]):
        read_row(dt, row, 0, steps[row])
        out = steps[row]
        for head in range(out.size):
            out[head] = out[head] + bias[head]
    values = steps.reshape(-1)
    for i in range(values.size):
        values[i] = simd.clamp(simd.softplus(values[i]), low, high)


@njit(cache=True, nogil=True)
def _scan_head(u, arrays, sample, head):  # type: ignore[no-untyped-def]
    """All chunks of one head."""
    count, groups, size, states = arrays.B.shape[1:]
    heads, channels = arrays.before.shape[1:3]
    width = (channels + LANES - 1) // LANES * LANES
    group = head * groups // heads
    rows = np.zeros((3, size, width), np.float32)
    work = _Chunk(
        np.zeros((states, width), np.float32), np.zeros((size, size), np.float32),
        rows[0], rows[1], rows[2], np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32),
        np.zeros(size, np.float32),
    )  # fmt: skip
    old, new = arrays.before[sample, head], arrays.after[sample, head]
    for p in range(channels):
        for n in range(old.shape[1]):
            work.state[n, p] = old[p, n]
    for chunk in range(count):
        _prepare(u, arrays, work, sample, head, chunk)
        _mask(arrays.scores[sample, chunk, group], work)
        _advance(arrays.B[sample, chunk, group], arrays.C[sample, chunk, group], work)
        _write(arrays, work, sample, head, chunk)
    for p in range(channels):
        for n in range(old.shape[1]):
            new[p, n] = work.state[n, p]


@njit(cache=True, nogil=True)
def _prepare(u, arrays, work, sample, head, chunk):  # type: ignore[no-untyped-def]
    """u, dt' u and sums of dt' A; tokens beyond the last have dt' = u = 0 and change nothing."""
    size, length = work.log_decay.size, arrays.y.shape[1]
    channels, A = arrays.before.shape[2], arrays.A[head]
    valid = min(size, length - chunk * size)
    first = sample * length + chunk * size
    total = 0.0  # float64, as in torch's cumsum
    work.u[valid:] = types.float32(0.0)
    work.weighted[valid:] = types.float32(0.0)
    for t in range(valid):
        step = arrays.steps[first + t, head]
        total += max(types.float64(step * A), FORGOTTEN)
        work.log_decay[t] = total
        work.rest[t] = total - work.log_decay[t]
        read_row(u, first + t, head * channels, work.u[t, :channels])
        _scaled(work.u[t], step, work.weighted[t])
    work.log_decay[valid:] = types.float32(total)
    work.rest[valid:] = total - types.float32(total)
    last, last_rest = work.log_decay[size - 1], work.rest[size - 1]
    for t in range(size):
        work.decay[t] = simd.exp(work.log_decay[t]) * (_ONE + work.rest[t])
    for t in range(size):
        work.to_end[t] = simd.exp((last - work.log_decay[t]) + (last_rest - work.rest[t]))


@njit(cache=True, nogil=True)
def _scaled(x, factor, out):  # type: ignore[no-untyped-def]
    for p in range(x.size):
        out[p] = x[p] * factor


@njit(cache=True, nogil=True)
def _mask(scores, work):  # type: ignore[no-untyped-def]
    """masked[t, s] = scores[t, s] exp(sum of dt' A over s < i <= t) for s <= t, else 0."""
    log_decay, rest = work.log_decay, work.rest
    for t in range(log_decay.size):
        row, out, own, own_rest = scores[t], work.masked[t], log_decay[t], rest[t]
        for s in range(t + 1):
            out[s] = row[s] * simd.exp((own - log_decay[s]) + (own_rest - rest[s]))


@njit(cache=True, nogil=True)
def _advance(B, C, work):  # type: ignore[no-untyped-def]
    """y = decay (C state) + masked (dt' u), then the state after the chunk."""
    size = work.log_decay.size
    work.y[:] = types.float32(0.0)
    add_product(C, work.state, work.y, False, False)
    for t in range(size):
        _scaled(work.y[t], work.decay[t], work.y[t])
    add_product(work.masked, work.weighted, work.y, False, True)
    for t in range(size):
        _scaled(work.weighted[t], work.to_end[t], work.weighted[t])
    decay = work.decay[size - 1]
    for n in range(work.state.shape[0]):
        _scaled(work.state[n], decay, work.state[n])
    add_product(B, work.weighted, work.state, True, False)


@njit(cache=True, nogil=True)
def _write(arrays, work, sample, head, chunk):  # type: ignore[no-untyped-def]
    """y + D u of the tokens that exist."""
    size, skip, channels = work.log_decay.size, arrays.D[head], arrays.before.shape[2]
    first = chunk * size
    for t in range(min(size, arrays.y.shape[1] - first)):
        out = arrays.y[sample, first + t, head * channels : (head + 1) * channels]
        y, u = work.y[t], work.u[t]
        for p in range(channels):
            out[p] = y[p] + skip * u[p]


@njit(cache=True, nogil=True)
def _step_head(u, arrays, sample, head):  # type: ignore[no-untyped-def]
    """The recurrence, token by token."""
    heads, channels = arrays.before.shape[1:3]
    group = head * arrays.B.shape[2] // heads
    state = arrays.after[sample, head]
    state[:] = arrays.before[sample, head]
    length = arrays.y.shape[1]
    for t in range(length):
        row = sample * length + t
        out = arrays.y[sample, t, head * channels : (head + 1) * channels]
        read_row(u, row, head * channels, out)
        step = arrays.steps[row, head]
        decay = simd.exp(step * arrays.A[head])
        b, c = arrays.B[sample, t, group, 0], arrays.C[sample, t, group, 0]
        for p in range(channels):
            out[p] = _step_row(state[p], decay, step * out[p], b, c) + arrays.D[head] * out[p]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _step_row(state, decay, entering, b, c):  # type: ignore[no-untyped-def]
    """State of one channel, in place, and its product with C."""
    total = types.float32(0.0)
    for n in range(state.size):
        state[n] = state[n] * decay + entering * b[n]
        total += state[n] * c[n]
    return total
