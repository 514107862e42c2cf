"""First four levels of the fast Walsh-Hadamard transform as LLVM IR, inside lines of sixteen floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.gemv import load, offset, store
from squamata.kernels.simd import FLOAT, INT32

LINE = 16
_FLOATS, _INTS = ir.VectorType(FLOAT, LINE), ir.VectorType(INT32, LINE)


@intrinsic
def transform_lines(_typing, where, lines):  # type: ignore[no-untyped-def]
    """In place x H_16 on each of so many lines of 16 float32 at an int64 address; additions in the usual order."""
    if where != types.int64 or lines != types.int64:
        return None
    return types.void(types.int64, types.int64), _emit_lines


def _emit_lines(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    where, lines = arguments
    with cgutils.for_range(builder, lines) as loop:
        place = offset(builder, where, loop.index, 4 * LINE)
        line = load(builder, place, _FLOATS, 4)
        width = 1
        while width < LINE:
            picks = ir.Constant(_INTS, [lane ^ width for lane in range(LINE)])
            signs = ir.Constant(_FLOATS, [-1.0 if lane & width else 1.0 for lane in range(LINE)])
            partner = builder.shuffle_vector(line, ir.Constant(_FLOATS, ir.Undefined), picks)
            line = builder.fadd(partner, builder.fmul(line, signs))
            width *= 2
        store(builder, line, place, 4)
    return ir.Constant(ir.IntType(8).as_pointer(), None)
