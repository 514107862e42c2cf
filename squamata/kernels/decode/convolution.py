"""One token through the causal convolution: history, taps, SiLU."""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import load, offset, store
from squamata.kernels.lanes import FLOATS, INTS, LANES
from squamata.kernels.memory import slice_float32, view_float32, view_int8
from squamata.kernels.simd import silu

_ZERO = np.float32(0.0)
_PAST = 3  # of four taps, what every published model has
_APART = [[_PAST * lane + tap for lane in range(LANES)] for tap in range(_PAST)]
_MOVED_ON = [
    _PAST * lane + tap + 1 if tap < _PAST - 1 else _PAST * LANES + lane for lane in range(LANES) for tap in range(_PAST)
]


def _four_taps(integer: bool) -> Any:
    """Numba intrinsic: ``convolve_history`` of sixteen channels at a time.

    Arguments, int64: addresses of the history (16 * blocks, 3), int8 if ``integer``, of the taps of these channels,
    of their values and of the output; bytes from one tap to the next; blocks.
    """
    element = ir.IntType(8) if integer else ir.FloatType()
    row, whole = ir.VectorType(element, LANES), ir.VectorType(element, _PAST * LANES)

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        history, taps, values, out, tap_bytes, blocks = arguments
        with cgutils.for_range(builder, blocks) as loop:
            where = offset(builder, history, loop.index, _PAST * LANES * (1 if integer else 4))
            past = load(builder, where, whole, 1)
            new = load(builder, offset(builder, values, loop.index, 64), FLOATS, 4)
            undefined = ir.Constant(whole, ir.Undefined)
            columns = [builder.shuffle_vector(past, undefined, ir.Constant(INTS, picks)) for picks in _APART]
            floats = [builder.sitofp(builder.sext(x, INTS), FLOATS) if integer else x for x in columns] + [new]
            total = None
            for tap, x in enumerate(floats):
                place = builder.add(taps, builder.mul(tap_bytes, ir.IntType(64)(tap)))
                term = builder.fmul(x, load(builder, offset(builder, place, loop.index, 64), FLOATS, 4))
                total = term if total is None else builder.fadd(total, term)
            store(builder, total, offset(builder, out, loop.index, 64), 4)
            entering = builder.trunc(builder.fptosi(new, INTS), row) if integer else new
            both = ir.VectorType(ir.IntType(32), _PAST * LANES)
            spread = ir.Constant(both, [*range(LANES), *[0] * (_PAST - 1) * LANES])
            entering = builder.shuffle_vector(entering, ir.Constant(row, ir.Undefined), spread)
            picks = ir.Constant(both, _MOVED_ON)
            store(builder, builder.shuffle_vector(past, entering, picks), where, 1)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def typed(_typing, history, taps, values, out, tap_bytes, blocks):
        return types.none(*[types.int64] * 6), codegen

    return intrinsic(typed)


_four_taps_int8, _four_taps_float32 = _four_taps(True), _four_taps(False)


@njit(cache=True)
def convolve_history(conv, history, x, u, offset, start, stop):
    """u[c] = sum over taps of history and x, and the history moves on by one."""
    taps = view_float32(conv.taps, conv.width * conv.channels)
    value = view_float32(x, stop)
    out = view_float32(u, stop)
    channels, past = conv.channels, conv.width - 1
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
    if conv.width == _PAST + 1:
        blocks, first, size = (stop - start) // LANES, offset + start, 1 if conv.integer else 4
        where, taps = conv.state + first * _PAST * size, conv.taps + 4 * first
        values, result, step = x + 4 * start, u + 4 * start, 4 * conv.channels
        if conv.integer:
            _four_taps_int8(where, taps, values, result, step, blocks)
        else:
            _four_taps_float32(where, taps, values, result, step, blocks)
        rest = start + blocks * LANES
    else:
        rest = start
    if conv.integer:
        convolve_history(conv, view_int8(conv.state, conv.channels * (conv.width - 1)), x, u, offset, rest, stop)
    else:
        convolve_history(conv, view_float32(conv.state, conv.channels * (conv.width - 1)), x, u, offset, rest, stop)
    out, scale = slice_float32(u, start, stop), slice_float32(conv.scale + 4 * offset, start, stop)
    bias = slice_float32(conv.bias + 4 * offset, start, stop)
    for c in range(out.size):
        out[c] = silu(out[c] * scale[c] + bias[c])
