"""Float rows as 16-bit integers, and these as two rows of int8, so that the int8 dot product multiplies them.

Every 128 values share a step, max |x| / 32639: x is ``step * (256 * high + low)`` within half a step, 1.5e-5 of the
largest of the 128 (bfloat16: 3.9e-3 of each value). NaN and infinity make the step, and with it the product, NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from squamata.kernels.gemv import (
    LARGEST,
    LEAST_STEP,
    emit_halves,
    emit_magnitude,
    emit_step,
    load,
    reduce_lanes,
    store,
)
from squamata.kernels.simd import FLOAT, INT32, constant

__all__ = ["GROUP", "LARGEST", "LEAST_STEP", "split_rows"]

GROUP, LANES = 128, 16
_FLOATS, _INTS, _INT64 = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES), ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_EVEN_FIRST = [start + place for start in (0, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]


@intrinsic
def _split_group(_typing, values, high, low, step):  # type: ignore[no-untyped-def]
    """128 float32 at an address -> 128 int8 each at ``high`` and ``low``, even columns of every eight first, and their
    step at ``step``; returns 8 * the sum of the integers, int32."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        values, high, low, step = arguments
        lines = [load(builder, builder.add(values, _INT64(64 * i)), _FLOATS, 4) for i in range(GROUP // LANES)]
        most, nothing = constant(_FLOATS, 0.0), constant(_FLOATS, 0.0)
        for x in lines:
            most, nothing = emit_magnitude(builder, x, most, nothing)
        inverse, own = emit_step(builder, most, nothing)
        store(builder, own, step, 4)
        total = constant(_INTS, 0)
        for number, x in enumerate(lines):
            whole, upper, lower = emit_halves(builder, x, inverse)
            total = builder.add(total, whole)
            for half, into in ((upper, high), (lower, low)):
                half = builder.shuffle_vector(half, half, ir.Constant(_INTS, _EVEN_FIRST))
                store(builder, builder.trunc(half, _BYTES), builder.add(into, _INT64(LANES * number)), 1)
        return builder.shl(reduce_lanes(builder, "add", (total,)), INT32(3))

    return types.int32(*[types.int64] * 4), codegen


@njit(cache=True, nogil=True, parallel=True)
def split_rows(x, codes, sums, steps):  # type: ignore[no-untyped-def]
    """float32 (M, K), K a multiple of 128 -> ``codes`` uint64 (2 M, K / 8), high bytes of a row before its low ones,
    even columns of every eight before odd ones; ``sums`` int32 (M, K / 128), 8 * the sum of 128; ``steps`` float32.
    """
    rows, groups = x.shape[0], x.shape[1] // GROUP
    for row in prange(rows):
        source, high, low = x[row], codes[2 * row], codes[2 * row + 1]
        for group in range(groups):
            first = group * GROUP
            sums[row, group] = _split_group(
                types.int64(source.ctypes.data + 4 * first),
                types.int64(high.ctypes.data + first),
                types.int64(low.ctypes.data + first),
                types.int64(steps.ctypes.data + 4 * (row * groups + group)),
            )
