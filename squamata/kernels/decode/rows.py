"""Sixteen rows of the scan's state move on by one token, emitted as LLVM IR.

A row alone spends more on its horizontal sum, its maximum and the division for its scale than on its N values; here
one tree of shuffles adds sixteen rows and one division serves them all. Values are those of one row at a time
(``state.update_row``): the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import load, offset, splat, store
from squamata.kernels.lanes import BYTES, FLOATS, INTS, LANES, emit_by_rounding, emit_prefetch_lines, emit_rounded
from squamata.kernels.simd import FLOAT, call, constant, emit_exp

ROWS = 16
_INT64 = ir.IntType(64)
Combine = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]


class _Arguments(NamedTuple):
    """Of the intrinsics, see ``_sixteen``."""

    data: ir.Value
    scratch: ir.Value
    scales: ir.Value
    a: ir.Value
    b: ir.Value
    c: ir.Value
    decays: ir.Value
    drives: ir.Value
    blocks: ir.Value
    decay_step: ir.Value
    soon: ir.Value
    soon_lines: ir.Value
    span: ir.Value
    least: ir.Value
    low: ir.Value
    high: ir.Value
    rounding: ir.Value


def _larger(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", high, low), high, low)


def _add(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    return builder.fadd(low, high)


def _across(builder: ir.IRBuilder, rows: Sequence[ir.Value], combine: Combine) -> ir.Value:
    """Lane r of the result: all lanes of vector r combined by halves, as ``lanes.sum_of_squares`` does one vector."""
    parts, width = list(rows), LANES
    while len(parts) > 1:
        width //= 2
        count = LANES // (2 * width)  # rows that a vector already holds
        half = len(parts) // 2
        joined = []
        for first, second in zip(parts[:half], parts[half:], strict=True):
            picks: list[list[int]] = [[], []]
            for side in (0, 1):
                for source in (0, LANES):
                    for row in range(count):
                        start = source + row * 2 * width + side * width
                        picks[side] += range(start, start + width)
            low, high = (builder.shuffle_vector(first, second, ir.Constant(INTS, pick)) for pick in picks)
            joined.append(combine(builder, low, high))
        parts = joined
    return builder.shuffle_vector(parts[0], parts[0], ir.Constant(INTS, _row_order()))


def _row_order() -> list[int]:
    """Where ``_across`` leaves row r: its bits reversed, for the halves of the list are joined first."""
    bits = LANES.bit_length() - 1
    return [int(f"{row:0{bits}b}"[::-1], 2) for row in range(LANES)]


def _sixteen(per_state_decay: bool, integer: bool) -> Any:
    """Numba intrinsic: sixteen rows of the state, and their products with C.

    s[n] = decay * s[n] + drive * B[n], total = sum_n s[n] C[n]; ``decay`` is exp(dt * A[n]) if ``per_state_decay``,
    where ``decays`` holds dt, else what ``decays`` holds. Integer rows hold codes that share a scale, which becomes
    max(largest |s| / span, least); s goes to ``scratch`` (16, N) in between.

    Arguments, int64: addresses of the rows, scratch, their scales (16,), A (16, N), B, C, decays, and of the drives
    (16,), where the totals are left; blocks of sixteen states; bytes from one decay to the next (0: all the same);
    address of what is wanted soon and how many lines of it to prefetch a row; float32: span, least scale, low, high;
    int64: rounding as ``lanes.close_row``; a seed counts on through the rows.
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        given = _Arguments(*arguments)
        totals = cgutils.alloca_once(builder, FLOATS, size=ROWS)
        mosts = cgutils.alloca_once(builder, FLOATS, size=ROWS)
        row_bytes = builder.mul(given.blocks, _INT64(LANES if integer else 4 * LANES))
        with cgutils.for_range(builder, _INT64(ROWS)) as rows:
            total, most = _advance_row(builder, given, rows.index, row_bytes, per_state_decay, integer)
            builder.store(total, builder.gep(totals, [rows.index]))
            builder.store(most, builder.gep(mosts, [rows.index]))
        store(builder, _gathered(builder, totals, _add), given.drives, 4)
        if integer:
            scale = builder.fdiv(_gathered(builder, mosts, _larger), splat(builder, given.span))
            scale = _larger(builder, splat(builder, given.least), scale)
            store(builder, scale, given.scales, 4)
            builder.store(builder.fdiv(constant(FLOATS, 1.0), scale), totals)
            _close(builder, given, builder.ptrtoint(totals, _INT64), row_bytes)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def typed(  # type: ignore[no-untyped-def]
        _typing, data, scratch, scales, a, b, c, decays, drives, blocks, decay_step, soon, soon_lines, span, least,
        low, high, rounding,
    ):  # fmt: skip
        return types.none(*[types.int64] * 12, *[types.float32] * 4, types.int64), codegen

    return intrinsic(typed)


def _advance_row(
    builder: ir.IRBuilder, given: _Arguments, row: ir.Value, row_bytes: ir.Value, per_state_decay: bool, integer: bool
) -> tuple[ir.Value, ir.Value]:
    """One of the sixteen; returns the partial sums of its product with C, and its largest magnitudes."""
    soon = builder.add(given.soon, builder.mul(builder.mul(row, given.soon_lines), _INT64(64)))
    emit_prefetch_lines(builder, soon, given.soon_lines)
    state_row = builder.add(given.data, builder.mul(row, row_bytes))
    here = builder.mul(row, builder.mul(given.blocks, _INT64(4 * LANES)))
    rate = splat(builder, load(builder, builder.add(given.decays, builder.mul(row, given.decay_step)), FLOAT, 4))
    drive = splat(builder, load(builder, offset(builder, given.drives, row, 4), FLOAT, 4))
    scale = splat(builder, load(builder, offset(builder, given.scales, row, 4), FLOAT, 4)) if integer else None
    total = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
    most = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
    into = builder.add(given.scratch, here) if integer else state_row
    with cgutils.for_range(builder, given.blocks) as loop:

        def at(base: ir.Value) -> ir.Value:
            return load(builder, offset(builder, base, loop.index, 64), FLOATS, 4)

        if integer:
            codes = load(builder, offset(builder, state_row, loop.index, LANES), BYTES, 1)
            state = builder.fmul(builder.sitofp(builder.sext(codes, INTS), FLOATS), scale)
        else:
            state = at(state_row)
        factor = emit_exp(builder, builder.fmul(rate, at(builder.add(given.a, here)))) if per_state_decay else rate
        state = builder.fadd(builder.fmul(factor, state), builder.fmul(drive, at(given.b)))
        builder.store(builder.fadd(builder.load(total), builder.fmul(state, at(given.c))), total)
        store(builder, state, offset(builder, into, loop.index, 64), 4)
        if integer:
            builder.store(_larger(builder, builder.load(most), call(builder, "fabs", (state,))), most)
    return builder.load(total), builder.load(most)


def _gathered(builder: ir.IRBuilder, table: ir.Value, combine: Combine) -> ir.Value:
    vectors = [builder.load(builder.gep(table, [_INT64(row)])) for row in range(ROWS)]
    return _across(builder, vectors, combine)


def _close(builder: ir.IRBuilder, given: _Arguments, inverses: ir.Value, row_bytes: ir.Value) -> None:
    """Sixteen rows of scratch become codes; ``inverses``: address of the reciprocals of their scales."""
    blocks, rounding = given.blocks, given.rounding
    low, high = splat(builder, given.low), splat(builder, given.high)

    def rows_with(rounding: ir.Value | None, stochastic: bool) -> None:
        with cgutils.for_range(builder, _INT64(ROWS)) as rows:
            inverse = splat(builder, load(builder, offset(builder, inverses, rows.index, 4), FLOAT, 4))
            done = builder.mul(rows.index, builder.mul(blocks, _INT64(LANES)))
            source = offset(builder, given.scratch, done, 4)
            into = builder.add(given.data, builder.mul(rows.index, row_bytes))
            with cgutils.for_range(builder, blocks) as loop:
                scaled = builder.fmul(load(builder, offset(builder, source, loop.index, 64), FLOATS, 4), inverse)
                place = offset(builder, done, loop.index, LANES) if stochastic else None
                code = emit_rounded(builder, scaled, low, high, rounding, place)
                store(builder, builder.trunc(code, BYTES), offset(builder, into, loop.index, LANES), 1)

    emit_by_rounding(builder, rounding, rows_with)


selective_rows = _sixteen(True, False)
selective_rows_int8 = _sixteen(True, True)
head_rows = _sixteen(False, False)
head_rows_int8 = _sixteen(False, True)
