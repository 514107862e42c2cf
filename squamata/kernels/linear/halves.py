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

from squamata.kernels.gemv import load, splat, store
from squamata.kernels.simd import FLOAT, INT32, call, constant

GROUP, LANES = 128, 16
LARGEST = 32639.0  # 127 * 256 + 127
LEAST_STEP = 1e-30  # of values that are all zero
_FLOATS, _INTS, _INT64 = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES), ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_EVEN_FIRST = [start + place for start in (0, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]


def _reduce(builder: ir.IRBuilder, name: str, kind: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(kind, [value.type for value in arguments]), name)
    return builder.call(function, arguments)


@intrinsic
def _split_group(_typing, values, high, low, step):  # type: ignore[no-untyped-def]
    """128 float32 at an address -> 128 int8 each at ``high`` and ``low``, even columns of every eight first, and their
    step at ``step``; returns 8 * the sum of the integers, int32."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        values, high, low, step = arguments
        lines = [load(builder, builder.add(values, _INT64(64 * i)), _FLOATS, 4) for i in range(GROUP // LANES)]
        most, nothing = constant(_FLOATS, 0.0), constant(_FLOATS, 0.0)
        for x in lines:
            size = call(builder, "fabs", (x,))
            most = builder.select(builder.fcmp_ordered(">", size, most), size, most)
            nothing = builder.fadd(nothing, builder.fmul(x, constant(_FLOATS, 0.0)))  # NaN of what is not finite
        largest = _reduce(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, (most,))
        own = builder.fdiv(largest, FLOAT(LARGEST))
        own = builder.select(builder.fcmp_ordered(">", own, FLOAT(LEAST_STEP)), own, FLOAT(LEAST_STEP))
        inverse = splat(builder, builder.fdiv(FLOAT(1.0), own))
        total = constant(_INTS, 0)
        for number, x in enumerate(lines):
            whole = builder.fptosi(call(builder, "rint", (builder.fmul(x, inverse),)), _INTS)
            total = builder.add(total, whole)
            upper = builder.ashr(builder.add(whole, constant(_INTS, 128)), constant(_INTS, 8))
            lower = builder.sub(whole, builder.shl(upper, constant(_INTS, 8)))
            for half, into in ((upper, high), (lower, low)):
                half = builder.shuffle_vector(half, half, ir.Constant(_INTS, _EVEN_FIRST))
                store(builder, builder.trunc(half, _BYTES), builder.add(into, _INT64(LANES * number)), 1)
        lost = _reduce(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", FLOAT, (FLOAT(0.0), nothing))
        store(builder, builder.fadd(own, lost), step, 4)
        total = _reduce(builder, f"llvm.vector.reduce.add.v{LANES}i32", INT32, (total,))
        return builder.shl(total, INT32(3))

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
