"""CPU: blocks of channels through all tokens; each input is read where it lies, next to its part of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from squamata.kernels import simd
from squamata.kernels.causal_conv1d import factored
from squamata.kernels.landing import (
    Source,
    array,
    landing,
    plain,
    read_row,
    readable,
    source,
    uniform,
    vector,
    write_row,
)
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site

WIDTH, LINE = 256, 16  # most channels of a block, and what they are a multiple of
TILE = 16  # tokens of a tile


class _Filter(NamedTuple):
    """Taps (K, C), what multiplies the sum (C,), and the bias (C,) or nothing; ``history`` (B, C, K - 1)."""

    taps: NDArray[np.float32]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    history: NDArray[np.float32]


def accepts(inputs: Sequence[Value], weight: Value, bias: Tensor | None, state: Value, out: Sequence[Site]) -> bool:
    if not (all(readable(value) for value in inputs) and readable(weight) and plain(bias) and readable(state)):
        return False
    if isinstance(state, QTensor):
        codes = uniform(state) and all(isinstance(x, QTensor) and uniform(x) for x in inputs)
        return codes and (not isinstance(weight, QTensor) or uniform(weight)) and inputs[0].shape[1] > 0
    return inputs[0].shape[1] > 0


def run(
    inputs: Sequence[Value], weight: Value, bias: Tensor | None, state: Value, out: Sequence[Site]
) -> tuple[Value, ...]:
    channels = weight.shape[0]
    batch, length, _ = inputs[0].shape
    integer = isinstance(state, QTensor)
    taps, scale = factored(weight, state) if isinstance(state, QTensor) else (as_float(weight), torch.ones(()))
    carrier = state.data if isinstance(state, QTensor) else state
    filters = _Filter(
        array(taps.float().t()),
        vector(scale, channels),
        np.empty(0, np.float32) if bias is None else vector(bias, channels),
        array(carrier.float()),
    )
    wheres = [landing(site, batch, length, value.shape[-1]) for value, site in zip(inputs, out, strict=True)]
    offset = 0
    for value, where in zip(inputs, wheres, strict=True):
        features = value.shape[-1]
        origin = _codes_alone(value) if integer else source(value)
        _convolve(origin, filters, where.target, batch, length, offset, numba.get_num_threads())
        _remember(carrier[:, offset : offset + features], value, integer)
        offset += features
    return tuple(where.value() for where in wheres)


def _codes_alone(value: Value) -> Source:
    """An input whose codes meet the taps before any scale does."""
    assert isinstance(value, QTensor)
    return source(QTensor(value.data, torch.ones(()), value.spec))


def _remember(state: Tensor, value: Value, integer: bool) -> None:
    """The last K - 1 inputs (B, L, C) become the state (B, C, K - 1), in place."""
    kept = state.shape[-1]
    x = value.data if integer and isinstance(value, QTensor) else as_float(value)
    recent = x[:, -kept:].transpose(1, 2) if kept else x[:, :0].transpose(1, 2)
    if (new := recent.shape[-1]) < kept:
        recent = torch.cat([state[..., new:], recent], dim=-1)
    state.copy_(recent)


@njit(cache=True, nogil=True, parallel=True)
def _convolve(origin, filters, target, batch, length, offset, threads):  # type: ignore[no-untyped-def]
    """One input, whose channels are those from ``offset`` on of the filters."""
    features = max(target.codes.shape[1], target.values.shape[1])
    size = min(WIDTH, (features + threads * LINE - 1) // (threads * LINE) * LINE)  # a part for every thread
    blocks = (features + size - 1) // size
    for task in prange(batch * blocks):
        _convolve_block(origin, filters, target, task // blocks, length, task % blocks * size, size, offset)


@njit(cache=True, nogil=True)
def _convolve_block(origin, filters, target, sample, length, first, size, offset):  # type: ignore[no-untyped-def]
    """All tokens of one sample for the channels from ``first`` on; ``window`` holds K - 1 tokens before the tile's."""
    features = max(target.codes.shape[1], target.values.shape[1])
    width = min(size, features - first)
    before = filters.taps.shape[0] - 1
    window = np.empty(((before + TILE), size), np.float32)
    total = np.empty(TILE * size, np.float32)
    for k in range(before):
        for c in range(width):
            window[k, c] = filters.history[sample, offset + first + c, k]
    for start in range(0, length, TILE):
        tokens = min(TILE, length - start)
        for t in range(tokens):
            read_row(origin, sample * length + start + t, first, window[before + t, :width])
        for t in range(tokens):
            _filter_token(filters, window[t:], total[t * size : t * size + width], offset + first)
        for i in range(tokens * size):
            total[i] = simd.silu(total[i])
        for t in range(tokens):
            write_row(target, sample * length + start + t, first, total[t * size : t * size + width])
        for k in range(before):
            window[k] = window[tokens + k]


@njit(cache=True, nogil=True)
def _filter_token(filters, window, out, first):  # type: ignore[no-untyped-def]
    """sum_k window[k] taps[k], times the scale, plus the bias, each rounded by itself."""
    last = first + out.size
    for k in range(filters.taps.shape[0]):
        taps, x = filters.taps[k, first:last], window[k]
        if k == 0:
            for c in range(out.size):
                out[c] = x[c] * taps[c]
        else:
            for c in range(out.size):
                out[c] = out[c] + x[c] * taps[c]
    scale = filters.scale[first:last]
    if filters.bias.size:
        bias = filters.bias[first:last]
        for c in range(out.size):
            out[c] = out[c] * scale[c] + bias[c]
    else:
        for c in range(out.size):
            out[c] = out[c] * scale[c]
