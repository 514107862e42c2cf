"""Row kernels emitted as sixteen-lane LLVM IR: reductions, landing on a grid, the update of one row of the state.

LLVM keeps the order of a float sum and therefore does not vectorize one; these loops say which order they use
(sixteen interleaved partial sums, then pairwise). Lengths are in blocks of sixteen; callers do the rest one by one.
All addresses are int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import emit_prefetch, load, offset, splat, store
from squamata.kernels.simd import FLOAT, INT32, call, constant, emit_clamp, emit_exp, emit_round_away, emit_uniform

LANES = 16
STOCHASTIC = 3  # a rounding of so much or more is the seed of the noise
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT32, LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
_INT64 = ir.IntType(64)


def _shuffle(builder: ir.IRBuilder, value: ir.Value, picks: Sequence[int]) -> ir.Value:
    mask = ir.Constant(ir.VectorType(INT32, len(picks)), list(picks))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _horizontal(builder: ir.IRBuilder, value: ir.Value, maximum: bool = False) -> ir.Value:
    """Sum (or maximum) of the lanes, by halves."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = _shuffle(builder, value, range(width)), _shuffle(builder, value, range(width, 2 * width))
        larger = builder.fcmp_ordered(">", high, low)
        value = builder.select(larger, high, low) if maximum else builder.fadd(low, high)
    return builder.extract_element(value, INT32(0))


@intrinsic
def sum_of_squares(_typing, row, blocks):  # type: ignore[no-untyped-def]
    """Sum of squares of float32 (16 * blocks,)."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        row, blocks = arguments
        total = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
        with cgutils.for_range(builder, blocks) as loop:
            x = load(builder, offset(builder, row, loop.index, 64), FLOATS, 4)
            builder.store(builder.fadd(builder.load(total), builder.fmul(x, x)), total)
        return _horizontal(builder, builder.load(total))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def largest_magnitude(_typing, row, blocks):  # type: ignore[no-untyped-def]
    """Largest absolute value of float32 (16 * blocks,)."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        row, blocks = arguments
        most = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
        with cgutils.for_range(builder, blocks) as loop:
            x = call(builder, "fabs", (load(builder, offset(builder, row, loop.index, 64), FLOATS, 4),))
            so_far = builder.load(most)
            builder.store(builder.select(builder.fcmp_ordered(">", x, so_far), x, so_far), most)
        return _horizontal(builder, builder.load(most), maximum=True)

    return types.float32(types.int64, types.int64), codegen


def emit_rounded(
    builder: ir.IRBuilder,
    scaled: ir.Value,
    low: ir.Value,
    high: ir.Value,
    rounding: ir.Value | None,
    place: ir.Value | None = None,
) -> ir.Value:
    """Codes within low..high as int32: ``rounding`` 1 half-away, 2 towards zero, None half-even (one instruction).

    With a ``place``, int64 index of the first lane: up with the fraction's probability, ``rounding`` being the seed.
    """
    if rounding is None:
        code = call(builder, "rint", (scaled,))
    elif place is None:
        away = builder.icmp_signed("==", rounding, rounding.type(1))
        code = builder.select(away, emit_round_away(builder, scaled), call(builder, "trunc", (scaled,)))
    else:
        below = call(builder, "floor", (scaled,))
        up = builder.fcmp_ordered("<", emit_noise(builder, rounding, place), builder.fsub(scaled, below))
        code = builder.select(up, builder.fadd(below, constant(FLOATS, 1.0)), below)
    return builder.fptosi(emit_clamp(builder, code, low, high), INTS)


def emit_noise(builder: ir.IRBuilder, seed: ir.Value, place: ir.Value) -> ir.Value:
    """Uniform in [0, 1), a number a lane, as ``simd.noise`` gives for ``seed + place + lane``."""
    counter = splat(builder, builder.trunc(builder.add(seed, place), INT32))
    return emit_uniform(builder, builder.add(counter, ir.Constant(INTS, list(range(LANES)))))


def emit_by_rounding(
    builder: ir.IRBuilder, rounding: ir.Value, loop_with: Callable[[ir.Value | None, bool], None]
) -> None:
    """Three copies of a loop, ``loop_with(rounding, stochastic)``: half-even, stochastic, the others."""
    with builder.if_else(builder.icmp_signed("==", rounding, rounding.type(0))) as (even, others):
        with even:
            loop_with(None, False)
        with others, builder.if_else(builder.icmp_signed(">=", rounding, rounding.type(STOCHASTIC))) as (some, rest):
            with some:
                loop_with(rounding, True)
            with rest:
                loop_with(rounding, False)


def _land(one_scale: bool) -> Any:
    """Numba intrinsic: values on a grid in place, v = code * scale, code = clamp(round(v * inverse)), codes kept.

    Arguments: addresses of the values (16 * blocks,) and of the codes int8 (0: not kept); blocks; inverse and scale,
    as addresses of one a value, or as float32 if ``one_scale``; low, high (float32); rounding (0 half-even, 1
    half-away, 2 towards zero).
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        values, codes, blocks, inverse, scale, low, high, rounding = arguments
        low, high = splat(builder, low), splat(builder, high)
        if one_scale:
            inverse, scale = splat(builder, inverse), splat(builder, scale)
        kept = builder.icmp_signed("!=", codes, codes.type(0))

        def loop_with(rounding: ir.Value | None) -> None:
            with cgutils.for_range(builder, blocks) as loop:

                def factor(base: ir.Value) -> ir.Value:
                    return base if one_scale else load(builder, offset(builder, base, loop.index, 64), FLOATS, 4)

                where = offset(builder, values, loop.index, 64)
                scaled = builder.fmul(load(builder, where, FLOATS, 4), factor(inverse))
                code = emit_rounded(builder, scaled, low, high, rounding)
                with builder.if_then(kept):
                    store(builder, builder.trunc(code, BYTES), offset(builder, codes, loop.index, LANES), 1)
                store(builder, builder.fmul(builder.sitofp(code, FLOATS), factor(scale)), where, 4)

        with builder.if_else(builder.icmp_signed("==", rounding, rounding.type(0))) as (even, others):
            with even:
                loop_with(None)
            with others:
                loop_with(rounding)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    factor_type = types.float32 if one_scale else types.int64

    def typed(_typing, values, codes, blocks, inverse, scale, low, high, rounding):  # type: ignore[no-untyped-def]
        kinds = (types.int64,) * 3, (factor_type,) * 2, (types.float32,) * 2
        return types.none(*kinds[0], *kinds[1], *kinds[2], types.int64), codegen

    return intrinsic(typed)


land_each = _land(False)
land_all = _land(True)


def _state_row(per_state_decay: bool, integer: bool) -> Any:
    """Numba intrinsic: update of one row of the state, and its product with C.

    s[n] = decay * s[n] + drive * B[n]; returns sum_n s[n] C[n], s in float32 before it is stored. ``decay`` is
    exp(dt * A[n]) if ``per_state_decay``, where the float argument is dt, else the float argument itself. Integer
    rows hold codes: s = code * scale[n] and code = clamp(round(s * inverse[n])).

    Arguments: addresses of the row, A, B, C, scale, inverse; blocks; decay or dt, drive, low, high (float32);
    rounding (0 half-even, 1 half-away, 2 towards zero, from ``STOCHASTIC`` on: up with the fraction's probability).
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        row, a, b, c, scale, inverse, blocks, decay, drive, low, high, rounding = arguments
        total = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
        rate, drive, low, high = (splat(builder, value) for value in (decay, drive, low, high))

        def loop_with(rounding: ir.Value | None, stochastic: bool) -> None:
            with cgutils.for_range(builder, blocks) as loop:

                def at(base: ir.Value) -> ir.Value:
                    return load(builder, offset(builder, base, loop.index, 64), FLOATS, 4)

                where = offset(builder, row, loop.index, LANES if integer else 4 * LANES)
                state = load(builder, where, BYTES if integer else FLOATS, 1)
                if integer:
                    state = builder.fmul(builder.sitofp(builder.sext(state, INTS), FLOATS), at(scale))
                factor = emit_exp(builder, builder.fmul(rate, at(a))) if per_state_decay else rate
                state = builder.fadd(builder.fmul(factor, state), builder.fmul(drive, at(b)))
                builder.store(builder.fadd(builder.load(total), builder.fmul(state, at(c))), total)
                if integer:
                    scaled, place = builder.fmul(state, at(inverse)), builder.mul(loop.index, _INT64(LANES))
                    code = emit_rounded(builder, scaled, low, high, rounding, place if stochastic else None)
                    state = builder.trunc(code, BYTES)
                store(builder, state, where, 1)

        if integer:
            emit_by_rounding(builder, rounding, loop_with)
        else:
            loop_with(None, False)
        return _horizontal(builder, builder.load(total))

    def typed(_typing, row, a, b, c, scale, inverse, blocks, decay, drive, low, high, rounding):  # type: ignore[no-untyped-def]
        return types.float32(*[types.int64] * 7, *[types.float32] * 4, types.int64), codegen

    return intrinsic(typed)


selective_row = _state_row(True, False)
selective_row_int8 = _state_row(True, True)
head_row = _state_row(False, False)
head_row_int8 = _state_row(False, True)


def _open_row(per_state_decay: bool) -> Any:
    """Numba intrinsic: as ``_state_row`` for codes that share one scale; the new values go to ``scratch`` in float32.

    Arguments: addresses of the codes, scratch, A, B, C; blocks; scale, decay or dt, drive (float32).
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        row, scratch, a, b, c, blocks, scale, decay, drive = arguments
        total = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
        scale, rate, drive = (splat(builder, value) for value in (scale, decay, drive))
        with cgutils.for_range(builder, blocks) as loop:

            def at(base: ir.Value) -> ir.Value:
                return load(builder, offset(builder, base, loop.index, 64), FLOATS, 4)

            codes = load(builder, offset(builder, row, loop.index, LANES), BYTES, 1)
            state = builder.fmul(builder.sitofp(builder.sext(codes, INTS), FLOATS), scale)
            factor = emit_exp(builder, builder.fmul(rate, at(a))) if per_state_decay else rate
            state = builder.fadd(builder.fmul(factor, state), builder.fmul(drive, at(b)))
            builder.store(builder.fadd(builder.load(total), builder.fmul(state, at(c))), total)
            store(builder, state, offset(builder, scratch, loop.index, 64), 4)
        return _horizontal(builder, builder.load(total))

    def typed(_typing, row, scratch, a, b, c, blocks, scale, decay, drive):  # type: ignore[no-untyped-def]
        return types.float32(*[types.int64] * 6, *[types.float32] * 3), codegen

    return intrinsic(typed)


open_selective_row = _open_row(True)
open_head_row = _open_row(False)


@intrinsic
def close_row(_typing, scratch, row, blocks, inverse, low, high, rounding):  # type: ignore[no-untyped-def]
    """codes[n] = clamp(round(scratch[n] * inverse)), int8 (16 * blocks,); rounding as ``_state_row``."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        scratch, row, blocks, inverse, low, high, rounding = arguments
        inverse, low, high = (splat(builder, value) for value in (inverse, low, high))

        def loop_with(rounding: ir.Value | None, stochastic: bool) -> None:
            with cgutils.for_range(builder, blocks) as loop:
                scaled = builder.fmul(load(builder, offset(builder, scratch, loop.index, 64), FLOATS, 4), inverse)
                place = builder.mul(loop.index, _INT64(LANES)) if stochastic else None
                code = emit_rounded(builder, scaled, low, high, rounding, place)
                store(builder, builder.trunc(code, BYTES), offset(builder, row, loop.index, LANES), 1)

        emit_by_rounding(builder, rounding, loop_with)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.none(*[types.int64] * 3, *[types.float32] * 3, types.int64), codegen


def emit_prefetch_lines(builder: ir.IRBuilder, where: ir.Value, lines: ir.Value) -> None:
    """Ask for ``lines`` cache lines of 64 bytes from ``where`` on to be brought into the second-level cache."""
    with cgutils.for_range(builder, lines) as loop:
        emit_prefetch(builder, offset(builder, where, loop.index, 64), level=2)


@intrinsic
def prefetch_lines(_typing, where, lines):  # type: ignore[no-untyped-def]
    """See :func:`emit_prefetch_lines`."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        emit_prefetch_lines(builder, *arguments)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.none(types.int64, types.int64), codegen
