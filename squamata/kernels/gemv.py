"""Matrix-vector products over packed tiles: ``y[n] = (sum_k w[n, k] x[k]) * (s_x * s_w[n]) + bias[n]``.

Every kind streams one line of 64 bytes after the other (see ``packing``) and advances sixteen rows a line. The
loops are emitted as LLVM IR, because LLVM does not find ``vpdpbusd`` in a numba loop by itself; without that
instruction the same IR multiplies 16-bit pairs, with identical integers.

Exactness. Integer sums are exact in int32. ``int8 x int8``: y = float32(sum) * (s_x * s_w[n]), the product of the
scales formed once in float32. ``int4 x int8``: sum over groups, in increasing order, of float32(sum_g) * s_g[n],
multiplied and added with separate roundings, then times s_x. ``int4 x int16``: float activations enter as 16-bit
integers with a step a group (``split_groups``); then the same, a group's value times its step. The other kinds with
float activations accumulate in float32 in four interleaved partial sums with fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from squamata.kernels.emit import dot_unsigned_signed, emit_prefetch, load, offset, splat, store
from squamata.kernels.halves import split_groups
from squamata.kernels.memory import address, call_address, slice_float32, view_int8, view_int32
from squamata.kernels.packing import LINE_BYTES, ROWS, UNROLL, Kind, PackedLinear
from squamata.kernels.simd import FLOAT, INT32, constant, emit_fma, has_vnni

_FLOATS = ir.VectorType(FLOAT, ROWS)
_INTS = ir.VectorType(INT32, ROWS)
_INT64 = ir.IntType(64)
PREFETCH_BYTES = 8 << 10  # ahead of the line in use: further than the hardware goes by itself


def _nibble_values(builder: ir.IRBuilder, index: ir.Value) -> ir.Value:
    """The low nibble of each lane minus 8, as float: one look-up in a register, exact."""
    name = "llvm.x86.avx512.permvar.sf.512"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS, _INTS]), name)
    return builder.call(function, (ir.Constant(_FLOATS, [nibble - 8.0 for nibble in range(16)]), index))


def _advance(kind: Kind, vnni: bool) -> Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]:
    """Function that adds one line of weights times its activations (read at address x) to an accumulator."""

    def broadcast_float(builder: ir.IRBuilder, x: ir.Value, k: int) -> ir.Value:
        return splat(builder, load(builder, builder.add(x, _INT64(4 * k)), FLOAT, 4))

    def broadcast_quad(builder: ir.IRBuilder, x: ir.Value, k: int) -> ir.Value:
        return splat(builder, load(builder, builder.add(x, _INT64(k)), INT32, 4))

    def float32(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        return emit_fma(builder, builder.bitcast(line, _FLOATS), broadcast_float(builder, x, 0), total)

    def bfloat16(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        low = builder.shl(line, constant(_INTS, 16))
        high = builder.and_(line, constant(_INTS, 0xFFFF0000))
        for k, half in enumerate((low, high)):
            total = emit_fma(builder, builder.bitcast(half, _FLOATS), broadcast_float(builder, x, k), total)
        return total

    def field(builder: ir.IRBuilder, line: ir.Value, low: int, width: int) -> ir.Value:
        """Bits low..low + width of each lane, sign-extended, as float."""
        line = builder.shl(line, constant(_INTS, 32 - low - width))
        return builder.sitofp(builder.ashr(line, constant(_INTS, 32 - width)), _FLOATS)

    def int8(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        for k in range(4):
            total = emit_fma(builder, field(builder, line, 8 * k, 8), broadcast_float(builder, x, k), total)
        return total

    def int4(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        for k in range(8):
            low = 8 * (k % 4) + 4 * (k // 4)
            index = builder.lshr(line, constant(_INTS, low)) if low else line
            total = emit_fma(builder, _nibble_values(builder, index), broadcast_float(builder, x, k), total)
        return total

    def int4_portable(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        line = builder.xor(line, constant(_INTS, 0x88888888))  # value + 8 -> two's complement
        for k in range(8):
            low = 8 * (k % 4) + 4 * (k // 4)
            total = emit_fma(builder, field(builder, line, low, 4), broadcast_float(builder, x, k), total)
        return total

    def int8_int8(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        shifted = builder.xor(load(builder, x, INT32, 4), INT32(-0x7F7F7F80))  # x + 128, unsigned
        return dot_unsigned_signed(builder, vnni, total, splat(builder, shifted), line)

    def int4_int8(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        nibbles = constant(_INTS, 0x0F0F0F0F)
        low, high = builder.and_(line, nibbles), builder.and_(builder.lshr(line, constant(_INTS, 4)), nibbles)
        total = dot_unsigned_signed(builder, vnni, total, low, broadcast_quad(builder, x, 0))
        return dot_unsigned_signed(builder, vnni, total, high, broadcast_quad(builder, x, 4))

    def int4_int16(builder: ir.IRBuilder, total: ir.Value, line: ir.Value, x: ir.Value) -> ir.Value:
        """``total``: a pair of vectors, of the high and of the low bytes."""
        return builder.insert_value(
            builder.insert_value(total, int4_int8(builder, builder.extract_value(total, 0), line, x), 0),
            int4_int8(builder, builder.extract_value(total, 1), line, builder.add(x, _INT64(8))), 1,
        )  # fmt: skip

    nibbles = int4 if vnni else int4_portable
    return (float32, bfloat16, int8, nibbles, int8_int8, int4_int8, int4_int16)[kind]


def _tile_product(kind: Kind, vnni: bool) -> Any:
    """Numba intrinsic for one kind: raw products of the rows of tiles ``first`` .. ``last``.

    Arguments, all int64: addresses of the output (float32, at row 0), the activations, the tiles, ``extra`` (int4:
    scales of the groups; int8 x int8: row sums) and ``sums`` (int4: int32, 8 x the sum of the activations of each
    group; if they were float, see ``_split_groups``); lines a tile, lines a group, first tile, last tile.
    """
    advance = _advance(kind, vnni)
    integer, grouped = kind.integer_sums, kind in (Kind.INT4, Kind.INT4_INT8, Kind.INT4_INT16)
    accumulator = _INTS if integer else _FLOATS
    pair = ir.LiteralStructType([_INTS, _INTS])
    lane_bytes = kind.lane_bytes

    def add_parts(builder: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
        add = builder.add if integer else builder.fadd
        a, b, c, d = parts
        return add(add(a, b), add(c, d))

    def finish(builder: ir.IRBuilder, total: ir.Value, row: ir.Value, extra: ir.Value, group: ir.Value) -> ir.Value:
        """Accumulator -> float32 (of a group, times its scales); ``group``: address of its sum."""
        if kind == Kind.INT8_INT8:
            total = builder.sub(total, load(builder, offset(builder, extra, row, 4), _INTS, 64))
        if grouped and integer:
            total = builder.sub(total, splat(builder, load(builder, group, INT32, 4)))
        if integer:
            total = builder.sitofp(total, _FLOATS)
        return builder.fmul(total, load(builder, offset(builder, extra, row, 4), _FLOATS, 64)) if grouped else total

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        out, x, tiles, extra, sums, lines, group_lines, first, last = arguments
        empty = ir.Constant(pair, None) if kind.splits else constant(accumulator, 0)
        parts = [cgutils.alloca_once(builder, pair if kind.splits else accumulator) for _ in range(UNROLL)]
        result = cgutils.alloca_once(builder, _FLOATS)
        groups = builder.udiv(lines, group_lines)
        steps = builder.udiv(group_lines, _INT64(UNROLL))
        with cgutils.for_range(builder, builder.sub(last, first)) as tile_loop:
            tile = builder.add(first, tile_loop.index)
            weights = offset(builder, tiles, builder.mul(tile, lines), LINE_BYTES)
            builder.store(constant(_FLOATS, 0.0), result)
            with cgutils.for_range(builder, groups) as group_loop:
                start = builder.mul(group_loop.index, group_lines)
                for part in parts:
                    builder.store(empty, part)
                with cgutils.for_range(builder, steps) as loop:
                    line = builder.add(start, builder.mul(loop.index, _INT64(UNROLL)))
                    for step, part in enumerate(parts):
                        place = offset(builder, weights, line, LINE_BYTES, step * LINE_BYTES)
                        emit_prefetch(builder, builder.add(place, _INT64(PREFETCH_BYTES)))
                        data = load(builder, place, _INTS, 64)
                        where = offset(builder, x, line, lane_bytes, step * lane_bytes)
                        builder.store(advance(builder, builder.load(part), data, where), part)
                sides = [builder.load(part) for part in parts]
                if kind.splits:
                    high, low = (
                        add_parts(builder, [builder.extract_value(side, half) for side in sides]) for half in (0, 1)
                    )
                    total = builder.add(builder.shl(high, constant(_INTS, 8)), low)
                else:
                    total = add_parts(builder, sides)
                block = builder.add(builder.mul(tile, groups), group_loop.index) if grouped else tile
                own = offset(builder, sums, group_loop.index, 4)
                value = finish(builder, total, builder.mul(block, _INT64(ROWS)), extra, own)
                if kind.splits:
                    worth = load(builder, offset(builder, own, groups, 4), FLOAT, 4)
                    value = builder.fmul(value, splat(builder, worth))
                builder.store(builder.fadd(builder.load(result), value), result)
            store(builder, builder.load(result), offset(builder, out, tile, LINE_BYTES), 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def typed(_typing: Any, out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
        return types.none(*[types.int64] * 9), codegen

    return intrinsic(typed)


_VNNI = has_vnni()
_float32 = _tile_product(Kind.FLOAT32, _VNNI)
_bfloat16 = _tile_product(Kind.BFLOAT16, _VNNI)
_int8 = _tile_product(Kind.INT8, _VNNI)
_int4 = _tile_product(Kind.INT4, _VNNI)
_int8_int8 = _tile_product(Kind.INT8_INT8, _VNNI)
_int4_int8 = _tile_product(Kind.INT4_INT8, _VNNI)
_int4_int16 = _tile_product(Kind.INT4_INT16, _VNNI)
_int4_int16_portable = _tile_product(Kind.INT4_INT16, False)
_int4_portable = _tile_product(Kind.INT4, False)
_int8_int8_portable = _tile_product(Kind.INT8_INT8, False)
_int4_int8_portable = _tile_product(Kind.INT4_INT8, False)


# Numba keeps machine code on disk by the name and place of a function, and one that another function makes has neither
# of its own: so one is written out for every kind.


def _rows_float32(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _float32(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_bfloat16(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _bfloat16(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int8(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int8(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int4(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int4(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int8_int8(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int8_int8(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int4_int8(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int4_int8(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int4_portable(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int4_portable(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int8_int8_portable(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int8_int8_portable(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int4_int8_portable(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int4_int8_portable(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int4_int16(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int4_int16(out, x, tiles, extra, sums, lines, group_lines, first, last)


def _rows_int4_int16_portable(out, x, tiles, extra, sums, lines, group_lines, first, last):  # type: ignore[no-untyped-def]
    _int4_int16_portable(out, x, tiles, extra, sums, lines, group_lines, first, last)


_ROWS = (_rows_float32, _rows_bfloat16, _rows_int8, _rows_int4, _rows_int8_int8, _rows_int4_int8, _rows_int4_int16)
_PORTABLE_ROWS = {
    Kind.INT4: _rows_int4_portable,
    Kind.INT8_INT8: _rows_int8_int8_portable,
    Kind.INT4_INT8: _rows_int4_int8_portable,
    Kind.INT4_INT16: _rows_int4_int16_portable,
}


@cache
def product_address(kind: Kind, portable: bool = False) -> int:
    """Address of the compiled ``void(9 x int64)`` of one kind, compiled on first use; see ``_tile_product``."""
    rows = _PORTABLE_ROWS.get(kind, _ROWS[kind]) if portable else _ROWS[kind]
    compiled = cfunc(types.void(*[types.int64] * 9), cache=True)(rows)
    _COMPILED.append(compiled)
    assert compiled.address is not None
    return compiled.address


_COMPILED: list[Any] = []  # keeps the machine code alive


@njit(cache=True)
def _call(function, arguments):  # type: ignore[no-untyped-def]
    call_address(function, arguments)


@njit(cache=True)
def sum_groups(x, group, groups, sums):  # type: ignore[no-untyped-def]
    """``sums[g] = 8 * sum of x over group g``, at addresses: x int8 (groups * group,), sums int32 (groups,)."""
    row = view_int8(x, groups * group)
    out = view_int32(sums, groups)
    for g in range(groups):
        total = types.int32(0)
        for k in range(g * group, (g + 1) * group):
            total = types.int32(total + row[k])
        out[g] = total * types.int32(8)


@njit(cache=True)
def scale_rows(out, scale, bias, x_scale, start, stop):  # type: ignore[no-untyped-def]
    """In place ``out[n] = out[n] * (x_scale * scale[n]) + bias[n]`` at addresses; no bias if its address is 0."""
    y, s = slice_float32(out, start, stop), slice_float32(scale, start, stop)
    if bias == 0:
        for n in range(y.size):
            y[n] = y[n] * (x_scale * s[n])
    else:
        b = slice_float32(bias, start, stop)
        for n in range(y.size):
            y[n] = y[n] * (x_scale * s[n]) + b[n]


def gemv(packed: PackedLinear, x: NDArray, x_scale: float = 1.0, portable: bool = False) -> NDArray[np.float32]:
    """One product on one thread: x (K,) int8 or float32, as the kind wants -> y (N,) float32.

    ``portable`` avoids the instructions of AVX-512 VNNI where the kind uses them, to test one against the other.
    """
    dtype = np.int8 if packed.kind.integer_activations else np.float32
    if x.dtype != dtype or x.shape != (packed.columns,):
        raise ValueError(f"activations must be {np.dtype(dtype)} ({packed.columns},), not {x.dtype} {x.shape}")
    row = np.zeros(packed.padded_columns, dtype)
    row[: packed.columns] = x
    out = np.full(packed.padded_rows, np.nan, np.float32)
    tiles, lines, _ = packed.tiles.shape
    groups = lines // packed.group_lines
    sums = np.zeros(2 * groups, np.int32)
    if packed.kind == Kind.INT4_INT8:
        sum_groups(address(row), packed.group_lines * 8, groups, address(sums))
    if packed.kind.splits:
        values, row = row, np.empty(2 * len(row), np.int8)
        split_groups(address(values), packed.group_lines * 8, groups, address(row), address(sums))
    extra = packed.groups if packed.groups is not None else packed.row_sums
    where = (address(out), address(row), address(packed.tiles), address(extra), address(sums))
    _call(product_address(packed.kind, portable), (*where, lines, packed.group_lines, 0, tiles))
    scale_rows(address(out), address(packed.scale), address(packed.bias), np.float32(x_scale), 0, packed.padded_rows)
    return out[: packed.rows]
