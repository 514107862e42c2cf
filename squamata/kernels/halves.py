"""Float rows as 16-bit integers, and these as two rows of int8, so that the int8 dot product multiplies them.

The values of a group share a step, max |x| / 32639: x is ``step * (256 * high + low)`` within half a step, 1.5e-5 of
the largest of them (bfloat16: 3.9e-3 of each value). NaN and infinity make the step, and with it the product, NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import load, offset, reduce_lanes, splat, store
from squamata.kernels.simd import FLOAT, INT32, call, constant

GROUP, LANES = 128, 16  # GROUP: of ``split_rows``
LARGEST = 32639.0  # 127 * 256 + 127: high and low byte are int8
LEAST_STEP = 1e-30  # of values that are all zero
_FLOATS, _INTS, _INT64 = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES), ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_EVEN_FIRST = [start + place for start in (0, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]


def emit_step(builder: ir.IRBuilder, most: ir.Value, nothing: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(reciprocal, step) of a group from lanes with its largest magnitudes, and with 0 times its values.

    The step of a group with NaN or infinity in it is NaN.
    """
    step = builder.fdiv(reduce_lanes(builder, "fmax", (most,)), FLOAT(LARGEST))
    step = builder.select(builder.fcmp_ordered(">", step, FLOAT(LEAST_STEP)), step, FLOAT(LEAST_STEP))
    lost = reduce_lanes(builder, "fadd", (FLOAT(0.0), nothing))
    return splat(builder, builder.fdiv(FLOAT(1.0), step)), builder.fadd(step, lost)


def emit_magnitude(builder: ir.IRBuilder, x: ir.Value, most: ir.Value, nothing: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``most`` and ``nothing`` of ``emit_step`` with sixteen values more."""
    size = call(builder, "fabs", (x,))
    most = builder.select(builder.fcmp_ordered(">", size, most), size, most)
    return most, builder.fadd(nothing, builder.fmul(x, constant(_FLOATS, 0.0)))


def emit_halves(builder: ir.IRBuilder, x: ir.Value, inverse: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(whole, high, low) as int32: whole = round(x * inverse) = 256 * high + low, both within int8."""
    whole = builder.fptosi(call(builder, "rint", (builder.fmul(x, inverse),)), _INTS)
    high = builder.ashr(builder.add(whole, constant(_INTS, 128)), constant(_INTS, 8))
    return whole, high, builder.sub(whole, builder.shl(high, constant(_INTS, 8)))


@intrinsic
def _split_groups(_typing, x, out, sums, blocks, groups):  # type: ignore[no-untyped-def]
    """float32 at an address as the 16-bit integers that int4 kinds multiply: ``groups`` of 16 * ``blocks`` values.

    ``out``: for every eight values eight high bytes, then eight low ones. ``sums``: int32 (groups,), 8 * the sum of
    the integers, then float32 (groups,), what 1 is worth.
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        x, out, sums, blocks, groups = arguments
        both = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
        picks = ir.Constant(ir.VectorType(INT32, 2 * LANES), both)
        most, nothing = (cgutils.alloca_once(builder, _FLOATS) for _ in range(2))
        total = cgutils.alloca_once(builder, _INTS)
        with cgutils.for_range(builder, groups) as group:
            first = builder.mul(group.index, blocks)
            builder.store(constant(_FLOATS, 0.0), most)
            builder.store(constant(_FLOATS, 0.0), nothing)
            builder.store(constant(_INTS, 0), total)
            with cgutils.for_range(builder, blocks) as loop:
                value = load(builder, offset(builder, x, builder.add(first, loop.index), 64), _FLOATS, 4)
                largest, lost = emit_magnitude(builder, value, builder.load(most), builder.load(nothing))
                builder.store(largest, most)
                builder.store(lost, nothing)
            inverse, step = emit_step(builder, builder.load(most), builder.load(nothing))
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.add(first, loop.index)
                value = load(builder, offset(builder, x, block, 64), _FLOATS, 4)
                whole, high, low = emit_halves(builder, value, inverse)
                builder.store(builder.add(builder.load(total), whole), total)
                mixed = builder.shuffle_vector(high, low, picks)
                bytes_ = builder.trunc(mixed, ir.VectorType(ir.IntType(8), 2 * LANES))
                store(builder, bytes_, offset(builder, out, block, 2 * LANES), 1)
            sum_ = builder.shl(reduce_lanes(builder, "add", (builder.load(total),)), INT32(3))
            store(builder, sum_, offset(builder, sums, group.index, 4), 4)
            store(builder, step, offset(builder, sums, builder.add(groups, group.index), 4), 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.none(*[types.int64] * 5), codegen


@njit(cache=True)
def split_groups(x, group, groups, out, sums):  # type: ignore[no-untyped-def]
    """See ``_split_groups``: groups of ``group`` values, a multiple of 16."""
    _split_groups(x, out, sums, group // LANES, groups)


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
