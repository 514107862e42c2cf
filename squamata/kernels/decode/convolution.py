"""One token through the causal convolution: history, taps, SiLU."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from squamata.kernels.memory import view_float32, view_int8
from squamata.kernels.simd import silu

_ZERO = np.float32(0.0)


@njit(cache=True)
def convolve_history(conv, history, x, u, offset, start, stop):
    """u[c] = sum over taps of history and x, and the history moves on by one."""
    taps = view_float32(conv.taps, conv.width * conv.channels)
    value = view_float32(x, stop)
    out = view_float32(u, stop)
    channels, past = conv.channels, conv.width - 1
    if past == 3:
        for c in range(start, stop):
            at, channel = (offset + c) * 3, offset + c
            a, b, d, e = np.float32(history[at]), np.float32(history[at + 1]), np.float32(history[at + 2]), value[c]
            total = a * taps[channel] + b * taps[channels + channel]
            out[c] = total + d * taps[2 * channels + channel] + e * taps[3 * channels + channel]
            history[at] = history[at + 1]
            history[at + 1] = history[at + 2]
            history[at + 2] = e
        return
    for c in range(start, stop):
        at, total = (offset + c) * past, _ZERO
        for tap in range(past):
            total += np.float32(history[at + tap]) * taps[tap * channels + offset + c]
        out[c] = total + value[c] * taps[past * channels + offset + c]
        for tap in range(past - 1):
            history[at + tap] = history[at + tap + 1]
        if past:
            history[at + past - 1] = value[c]


@njit(cache=True)
def convolve(conv, x, u, offset, start, stop):
    """Causal convolution and SiLU of channels start..stop of a part that begins at channel ``offset``."""
    if conv.integer:
        convolve_history(conv, view_int8(conv.state, conv.channels * (conv.width - 1)), x, u, offset, start, stop)
    else:
        convolve_history(conv, view_float32(conv.state, conv.channels * (conv.width - 1)), x, u, offset, start, stop)
    out = view_float32(u, stop)
    scale = view_float32(conv.scale + 4 * offset, stop)
    bias = view_float32(conv.bias + 4 * offset, stop)
    for c in range(start, stop):
        out[c] = silu(out[c] * scale[c] + bias[c])
