"""Hadamard rotation of one row of float32 at an address: lines of sixteen as LLVM IR, what is smaller as a plain loop.

H = H_m (x) H_{2^k}: four levels of butterflies inside a line, the other levels between lines, then H_m between
parts of 2^k. Additions in the usual order; a product with +-1 is exact, so fused multiply-add adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import load, offset, splat, store
from squamata.kernels.memory import view_float32
from squamata.kernels.simd import FLOAT, INT32, emit_fma

LINE = 16
TOGETHER = 4  # rows of H_m; its orders above 1 are multiples of four
_FLOATS, _INTS, _INT64 = ir.VectorType(FLOAT, LINE), ir.VectorType(INT32, LINE), ir.IntType(64)


@intrinsic
def transform_lines(_typing, where, lines):  # type: ignore[no-untyped-def]
    """In place x H_16 on each of so many lines of 16 float32 at an int64 address."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        where, lines = arguments
        with cgutils.for_range(builder, lines) as loop:
            place = offset(builder, where, loop.index, 4 * LINE)
            line = load(builder, place, _FLOATS, 4)
            width = 1
            while width < LINE:
                picks = ir.Constant(_INTS, [lane ^ width for lane in range(LINE)])
                signs = ir.Constant(_FLOATS, [-1.0 if lane & width else 1.0 for lane in range(LINE)])
                partner = builder.shuffle_vector(line, ir.Constant(_FLOATS, ir.Undefined), picks)
                line = emit_fma(builder, line, signs, partner)
                width *= 2
            store(builder, line, place, 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(types.int64, types.int64), codegen


@intrinsic
def butterfly_lines(_typing, where, lines, width):  # type: ignore[no-untyped-def]
    """In place (a, b) -> (a + b, a - b) for lines a and the ones ``width`` further; both counts are powers of two."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        where, lines, width = arguments
        below = builder.sub(width, _INT64(1))
        with cgutils.for_range(builder, builder.lshr(lines, _INT64(1))) as loop:
            inside = builder.and_(loop.index, below)
            first = builder.add(builder.shl(builder.sub(loop.index, inside), _INT64(1)), inside)
            places = [offset(builder, where, line, 4 * LINE) for line in (first, builder.add(first, width))]
            a, b = (load(builder, place, _FLOATS, 4) for place in places)
            store(builder, builder.fadd(a, b), places[0], 4)
            store(builder, builder.fsub(a, b), places[1], 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def multiply_base(_typing, row, out, base, order, lines, factor):  # type: ignore[no-untyped-def]
    """out = factor * H_m x, x and out seen as (m, 16 * lines) at addresses; base (m, m) float32, m a multiple of four.

    Arguments int64, ``factor`` float32.
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        row, out, base, order, lines, factor = arguments
        factor = splat(builder, factor)
        part_bytes = builder.mul(lines, _INT64(4 * LINE))
        with cgutils.for_range(builder, builder.udiv(order, _INT64(TOGETHER))) as quads:
            first = builder.mul(quads.index, _INT64(TOGETHER))
            with cgutils.for_range(builder, lines) as columns:
                shift = builder.mul(columns.index, _INT64(4 * LINE))
                sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(TOGETHER)]
                for slot in sums:
                    builder.store(ir.Constant(_FLOATS, [0.0] * LINE), slot)
                with cgutils.for_range(builder, order) as loop:
                    place = builder.add(builder.add(row, shift), builder.mul(loop.index, part_bytes))
                    x = load(builder, place, _FLOATS, 4)
                    for number, slot in enumerate(sums):
                        at = builder.add(builder.mul(builder.add(first, _INT64(number)), order), loop.index)
                        sign = splat(builder, load(builder, offset(builder, base, at, 4), FLOAT, 4))
                        builder.store(emit_fma(builder, sign, x, builder.load(slot)), slot)
                for number, slot in enumerate(sums):
                    into = builder.mul(builder.add(first, _INT64(number)), part_bytes)
                    place = builder.add(builder.add(out, shift), into)
                    store(builder, builder.fmul(builder.load(slot), factor), place, 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(*[types.int64] * 5, types.float32), codegen


@njit(cache=True, nogil=True)
def rotate(row, spare, size, base, order, power, factor):  # type: ignore[no-untyped-def]
    """Blocks of ``order * power`` of the row, float32 (size,), times H, times ``factor``; returns where the result is.

    Arguments int64 but for the factor. ``row`` is overwritten; ``spare``: as much room, where the result of an order
    above 1 goes; ``base``: address of H_m (m, m).
    """
    _walsh_hadamard(row, size, power)
    if order == 1:
        x = view_float32(row, size)
        for i in range(size):
            x[i] = x[i] * factor
        return row
    block = order * power
    for start in range(0, size, block):
        if power >= LINE:
            multiply_base(row + 4 * start, spare + 4 * start, base, order, power // LINE, factor)
        else:
            _multiply_base(row + 4 * start, spare + 4 * start, base, order, power, factor)
    return spare


@njit(cache=True, nogil=True)
def _walsh_hadamard(row, size, power):  # type: ignore[no-untyped-def]
    """In place x H_power for every ``power`` values, by butterflies of growing width."""
    width = types.int64(1)
    if power >= LINE:
        transform_lines(row, size // LINE)
        width = types.int64(LINE)
        while width < power:
            for start in range(0, size, power):
                butterfly_lines(row + 4 * start, power // LINE, width // LINE)
            width *= 2
        return
    x = view_float32(row, size)
    while width < power:
        for start in range(0, size, 2 * width):
            for i in range(start, start + width):
                a, b = x[i], x[i + width]
                x[i], x[i + width] = a + b, a - b
        width *= 2


@njit(cache=True, nogil=True)
def _multiply_base(row, out, base, order, power, factor):  # type: ignore[no-untyped-def]
    """``multiply_base`` for parts shorter than a line."""
    x, y, signs = view_float32(row, order * power), view_float32(out, order * power), view_float32(base, order * order)
    for i in range(order):
        for c in range(power):
            total = types.float32(0.0)
            for j in range(order):
                total = total + signs[i * order + j] * x[j * power + c]
            y[i * power + c] = total * factor
