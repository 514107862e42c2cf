"""Inner loop of the selective scan as LLVM IR: sixteen channels side by side through a few tokens.

Four state indices at a time stay in registers with their A, while the tokens pass; the result of sixteen channels is
the only thing that goes to memory. The exponential is of base two, because A comes multiplied with log2(e).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import load, offset, splat, store
from squamata.kernels.simd import FLOAT, INT32, constant, emit_fma

LANES = 16  # channels of a strip
TOGETHER = 4  # state indices in registers at a time
LOG2_E = 1.0 / math.log(2.0)
_LANE_BYTES = 4 * LANES
_FLOATS, _INTS, _INT64 = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES), ir.IntType(64)
_ROUNDER = 12582912.0  # 1.5 * 2^23: the low bits of a sum with it are the nearest integer
# (2^f - 1) / f on |f| <= 1/2, Chebyshev interpolation that is exact at 0
_POWER = (
    0.6931471824645996,
    0.24022650718688965,
    0.05550356954336166,
    0.009618083015084267,
    0.001339086331427097,
    0.00015453163359779865,
)


def emit_power_of_two(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``2^x`` for x <= 0, not below 2^-126; within 1e-7."""
    lowest = constant(_FLOATS, -126.0)
    x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
    shifted = builder.fadd(x, constant(_FLOATS, _ROUNDER))
    f = builder.fsub(x, builder.fsub(shifted, constant(_FLOATS, _ROUNDER)))
    value: ir.Value = constant(_FLOATS, _POWER[-1])
    for coefficient in reversed((1.0, *_POWER[:-1])):
        value = emit_fma(builder, value, f, constant(_FLOATS, coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), constant(_INTS, 23))
    return builder.bitcast(builder.add(builder.bitcast(value, _INTS), exponent), _FLOATS)


@intrinsic
def advance(_typing, state, a, dt, input_, y, b, c, tokens, states, stride):  # type: ignore[no-untyped-def]
    """``s[n] = 2^(dt[t] a[n]) s[n] + input[t] b[t, n];  y[t] += s[n] c[t, n]`` for a strip of 16 channels.

    Addresses (int64) of float32: ``state``, ``a`` (states, 16); ``dt``, ``input``, ``y`` (tokens, 16) with rows
    ``stride`` bytes apart; ``b``, ``c`` (tokens, states). ``states`` is a multiple of four.
    """
    arguments = (state, a, dt, input_, y, b, c, tokens, states, stride)
    if any(argument != types.int64 for argument in arguments):
        return None
    return types.void(*[types.int64] * len(arguments)), _emit_advance


def _emit_advance(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    state, a, dt, input_, y, b, c, tokens, states, stride = arguments
    carried = [cgutils.alloca_once(builder, _FLOATS) for _ in range(TOGETHER)]
    with cgutils.for_range(builder, builder.udiv(states, _INT64(TOGETHER))) as quad:
        first = builder.mul(quad.index, _INT64(TOGETHER))
        decays = []
        for n, slot in enumerate(carried):
            decays.append(load(builder, offset(builder, a, first, _LANE_BYTES, n * _LANE_BYTES), _FLOATS, 4))
            builder.store(load(builder, offset(builder, state, first, _LANE_BYTES, n * _LANE_BYTES), _FLOATS, 4), slot)
        with cgutils.for_range(builder, tokens) as loop:
            row = builder.mul(loop.index, stride)
            step = load(builder, builder.add(dt, row), _FLOATS, 4)
            entering = load(builder, builder.add(input_, row), _FLOATS, 4)
            total = load(builder, builder.add(y, row), _FLOATS, 4)
            cell = builder.add(builder.mul(loop.index, states), first)
            for n, slot in enumerate(carried):
                decay = emit_power_of_two(builder, builder.fmul(step, decays[n]))
                in_weight = splat(builder, load(builder, offset(builder, b, cell, 4, 4 * n), FLOAT, 4), LANES)
                out_weight = splat(builder, load(builder, offset(builder, c, cell, 4, 4 * n), FLOAT, 4), LANES)
                value = emit_fma(builder, builder.load(slot), decay, builder.fmul(entering, in_weight))
                builder.store(value, slot)
                total = emit_fma(builder, value, out_weight, total)
            store(builder, total, builder.add(y, row), 4)
        for n, slot in enumerate(carried):
            where = offset(builder, state, first, _LANE_BYTES, n * _LANE_BYTES)
            store(builder, builder.load(slot), where, 4)
    return ir.Constant(ir.IntType(8).as_pointer(), None)
