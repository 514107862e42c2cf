"""Pieces of LLVM IR that the CPU kernels share: memory at int64 addresses, lanes, the int8 dot product."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from squamata.kernels.packing import ROWS
from squamata.kernels.simd import INT32, constant

_INTS = ir.VectorType(INT32, ROWS)
_BYTES = ir.VectorType(ir.IntType(8), 4 * ROWS)
_PAIRS = ir.VectorType(ir.IntType(16), 2 * ROWS)
_INT64 = ir.IntType(64)


def load(builder: ir.IRBuilder, where: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    """Load a value of this LLVM type from an int64 address."""
    value = builder.load(builder.inttoptr(where, kind.as_pointer()), typ=kind)
    value.align = align
    return value


def store(builder: ir.IRBuilder, value: ir.Value, where: ir.Value, align: int) -> None:
    """Store a value at an int64 address."""
    builder.store(value, builder.inttoptr(where, value.type.as_pointer())).align = align


def offset(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, size: int, extra: int = 0) -> ir.Value:
    """``base + index * size + extra``."""
    return builder.add(builder.add(base, builder.mul(index, _INT64(size))), _INT64(extra))


def emit_prefetch(builder: ir.IRBuilder, where: ir.Value, level: int = 3) -> None:
    """Ask for the cache line at an address, which need not be valid, into the first (3) or second (2) level."""
    pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, INT32, INT32, INT32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    read, data = INT32(0), INT32(1)
    builder.call(function, (builder.inttoptr(where, pointer), read, INT32(level), data))


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = ROWS) -> ir.Value:
    """The same scalar in every lane."""
    kind = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), constant(ir.VectorType(INT32, lanes), 0))


def dot_unsigned_signed(builder: ir.IRBuilder, vnni: bool, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """``total[lane] += sum of four uint8 x int8 products``; all arguments are <16 x i32>."""
    if vnni:
        name = "llvm.x86.avx512.vpdpbusd.512"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(_INTS, [_INTS, _BYTES, _BYTES]), name)
        return builder.call(function, (total, builder.bitcast(u, _BYTES), builder.bitcast(s, _BYTES)))
    eight, wide = constant(_PAIRS, 8), ir.VectorType(INT32, 2 * ROWS)
    u, s = builder.bitcast(u, _PAIRS), builder.bitcast(s, _PAIRS)
    even = builder.and_(u, constant(_PAIRS, 255)), builder.ashr(builder.shl(s, eight), eight)
    odd = builder.lshr(u, eight), builder.ashr(s, eight)
    for left, right in (even, odd):
        product = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
        for first in (0, 1):  # the shape of pmaddwd
            picks = ir.Constant(_INTS, [2 * lane + first for lane in range(ROWS)])
            total = builder.add(total, builder.shuffle_vector(product, ir.Constant(wide, ir.Undefined), picks))
    return total


def reduce_lanes(builder: ir.IRBuilder, name: str, arguments: Sequence[ir.Value]) -> ir.Value:
    """``llvm.vector.reduce.NAME`` of the last argument."""
    vector = arguments[-1].type
    suffix = "i32" if vector.element == INT32 else "f32"
    name = f"llvm.vector.reduce.{name}.v{vector.count}{suffix}"
    function = builder.module.globals.get(name)
    if function is None:
        kinds = [value.type for value in arguments]
        function = ir.Function(builder.module, ir.FunctionType(vector.element, kinds), name)
    return builder.call(function, arguments)
