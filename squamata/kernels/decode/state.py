"""One row of the scan's state moves on by one token: float32, int8 with static scales, int8 with its own scale."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from squamata.kernels.decode.records import DYNAMIC, FLOAT, STATIC
from squamata.kernels.decode.rows import ROWS, head_rows, head_rows_int8, selective_rows, selective_rows_int8
from squamata.kernels.grid import SMALLEST_SCALE
from squamata.kernels.lanes import (
    STOCHASTIC,
    close_row,
    head_row,
    head_row_int8,
    largest_magnitude,
    open_head_row,
    open_selective_row,
    prefetch_lines,
    selective_row,
    selective_row_int8,
)
from squamata.kernels.memory import view_float32, view_int8, view_int32
from squamata.kernels.simd import clamp, divide, exp, floor, noise, rint, round_away, truncate

_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_LEAST_SCALE = np.float32(SMALLEST_SCALE)


@njit(cache=True)
def update_rows(state, first, last, states, scratch, a, b, c, decays, decay_step, drives, soon, soon_lines, selective):
    """Rows first..last move on; ``drives`` float32, at the address of row 0, become their products with C.

    ``decays``: address of the first row's decay (Mamba-1: dt), the next ``decay_step`` bytes further. ``a``: address
    of the first row's A. ``soon_lines`` cache lines a row are prefetched from ``soon`` on.
    """
    row, end = first, first
    if state.mode != STATIC and states % 16 == 0:
        end = first + (last - first) // ROWS * ROWS
    blocks, row_bytes = states // 16, states * (1 if state.mode else 4)
    low, high, span = state.low, state.high, state.span
    while row < end:
        done, rounding = row - first, rounding_of(state, row, states)
        data, scales, drive = state.data + row * row_bytes, state.scale + 4 * row, drives + 4 * row
        rate, weights, matrix = decays + done * decay_step, soon + done * soon_lines * 64, a + done * states * 4
        if state.mode and selective:
            selective_rows_int8(
                data, scratch, scales, matrix, b, c, rate, drive, blocks, decay_step, weights, soon_lines,
                span, _LEAST_SCALE, low, high, rounding,
            )  # fmt: skip
        elif state.mode:
            head_rows_int8(
                data, scratch, scales, matrix, b, c, rate, drive, blocks, decay_step, weights, soon_lines,
                span, _LEAST_SCALE, low, high, rounding,
            )  # fmt: skip
        elif selective:
            selective_rows(
                data, scratch, scales, matrix, b, c, rate, drive, blocks, decay_step, weights, soon_lines,
                span, _LEAST_SCALE, low, high, rounding,
            )  # fmt: skip
        else:
            head_rows(
                data, scratch, scales, matrix, b, c, rate, drive, blocks, decay_step, weights, soon_lines,
                span, _LEAST_SCALE, low, high, rounding,
            )  # fmt: skip
        row += ROWS
    values, rates = view_float32(drives, last), view_float32(decays, last - first)
    for row in range(end, last):
        done = row - first
        prefetch_lines(soon + done * soon_lines * 64, soon_lines)
        rate, matrix = rates[done * decay_step // 4], a + done * states * 4
        values[row] = update_row(state, row, states, scratch, matrix, b, c, rate, values[row], selective)


@njit(cache=True)
def update_row(state, row, states, scratch, a, b, c, decay, drive, selective):
    """Row ``row`` of the state (states,) moves on by one token; returns its product with C.

    ``scratch``: room for float32 (states,). ``a``: address of A's row (Mamba-1), where ``decay`` is dt; else ``decay``
    is the decay itself.
    """
    if state.mode == DYNAMIC:
        return update_row_dynamic(state, row, states, scratch, a, b, c, decay, drive, selective)
    if state.mode == FLOAT:
        return update_floats(state.data + row * states * 4, states, a, b, c, decay, drive, selective)
    blocks = states // 16
    table = np.int64(view_int32(state.index, row + 1)[row]) * states * 4
    scale, inverse = state.scale + table, state.inverse + table
    where = state.data + row * states
    low, high, rounding = state.low, state.high, rounding_of(state, row, states)
    if selective:
        y = selective_row_int8(where, a, b, c, scale, inverse, blocks, decay, drive, low, high, rounding)
    else:
        y = head_row_int8(where, a, b, c, scale, inverse, blocks, decay, drive, low, high, rounding)
    B, C, codes = view_float32(b, states), view_float32(c, states), view_int8(where, states)
    for n in range(blocks * 16, states):
        factor = exp(decay * view_float32(a, states)[n]) if selective else decay
        s = factor * (np.float32(codes[n]) * view_float32(scale, states)[n]) + drive * B[n]
        codes[n] = round_code(state, s * view_float32(inverse, states)[n], rounding + n)
        y += s * C[n]
    return y


@njit(cache=True)
def update_floats(where, states, a, b, c, decay, drive, selective):
    """``update_row`` for float32 at an address."""
    blocks = states // 16
    if selective:
        y = selective_row(where, a, b, c, 0, 0, blocks, decay, drive, _ZERO, _ZERO, np.int64(0))
    else:
        y = head_row(where, a, b, c, 0, 0, blocks, decay, drive, _ZERO, _ZERO, np.int64(0))
    B, C, values = view_float32(b, states), view_float32(c, states), view_float32(where, states)
    for n in range(blocks * 16, states):
        factor = exp(decay * view_float32(a, states)[n]) if selective else decay
        s = factor * values[n] + drive * B[n]
        values[n] = s
        y += s * C[n]
    return y


@njit(cache=True)
def update_row_dynamic(state, row, states, scratch, a, b, c, decay, drive, selective):
    """The row is read with its scale, moves on in float32, and is written with the scale it then has."""
    where, blocks = state.data + row * states, states // 16
    scales = view_float32(state.scale, row + 1)
    scale = scales[row]
    if selective:
        y = open_selective_row(where, scratch, a, b, c, blocks, scale, decay, drive)
    else:
        y = open_head_row(where, scratch, a, b, c, blocks, scale, decay, drive)
    most = largest_magnitude(scratch, blocks)
    B, C = view_float32(b, states), view_float32(c, states)
    codes, values = view_int8(where, states), view_float32(scratch, states)
    for n in range(blocks * 16, states):
        factor = exp(decay * view_float32(a, states)[n]) if selective else decay
        values[n] = factor * (np.float32(codes[n]) * scale) + drive * B[n]
        y += values[n] * C[n]
        most = max(most, abs(values[n]))
    scale = max(divide(most, state.span), _LEAST_SCALE)
    scales[row] = scale
    inverse = divide(_ONE, scale)
    rounding = rounding_of(state, row, states)
    close_row(scratch, where, blocks, inverse, state.low, state.high, rounding)
    for n in range(blocks * 16, states):
        codes[n] = round_code(state, values[n] * inverse, rounding + n)
    return y


@njit(cache=True)
def rounding_of(state, row, states):
    """How row ``row`` is rounded: a seed counts on, so that every element has noise of its own."""
    return state.rounding + row * states if state.rounding >= STOCHASTIC else state.rounding


@njit(cache=True)
def round_code(state, scaled, counter):
    """The code of a value already divided by its scale; ``counter``: of the noise, if rounding is stochastic."""
    if state.rounding >= STOCHASTIC:
        below = floor(scaled)
        code = below + _ONE if noise(counter) < scaled - below else below
        return np.int8(np.int32(clamp(code, state.low, state.high)))
    return np.int8(np.int32(round_value(scaled, state.low, state.high, state.rounding)))


@njit(cache=True)
def round_value(x, low, high, rounding):
    """One float32 to the nearest integer within low..high: 0 ties to even, 1 ties away from zero, 2 towards zero."""
    if rounding == 0:
        return clamp(rint(x), low, high)
    return clamp(round_away(x) if rounding == 1 else truncate(x), low, high)
