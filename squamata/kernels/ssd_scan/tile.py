"""Inner loop of a float32 product as LLVM IR: a few rows by a few vectors of sums in registers.

A BLAS call would need its operands for all chunks and heads in memory; here they are made, used and forgotten in the
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from squamata.kernels.emit import load, splat, store
from squamata.kernels.simd import FLOAT, emit_fma, has_vnni

ROWS, LANES = 4, 16
WIDE = 4 if has_vnni() else 1  # vectors of a wide tile: as many sums as registers hold
_FLOATS, _INT64 = ir.VectorType(FLOAT, LANES), ir.IntType(64)


def _product(vectors: int) -> Any:
    """Intrinsic ``out[r, c] += sum_k a[r, k] b[k, c]`` for 4 rows and 16 ``vectors`` columns.

    Addresses and strides in bytes, int64: a, b, out; depth K; strides of a along r and k, of b along k, of out along
    r. Rows of b and out are contiguous.
    """

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        a, b, out, depth, a_row, a_column, b_row, out_row = arguments
        starts = [builder.add(out, builder.mul(out_row, _INT64(r))) for r in range(ROWS)]
        places = [[builder.add(start, _INT64(4 * LANES * v)) for v in range(vectors)] for start in starts]
        sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in row] for row in places]
        for row, slots in zip(places, sums, strict=True):
            for place, slot in zip(row, slots, strict=True):
                builder.store(load(builder, place, _FLOATS, 4), slot)
        with cgutils.for_range(builder, depth) as loop:
            line = builder.add(b, builder.mul(loop.index, b_row))
            right = [load(builder, builder.add(line, _INT64(4 * LANES * v)), _FLOATS, 4) for v in range(vectors)]
            column = builder.add(a, builder.mul(loop.index, a_column))
            for r, slots in enumerate(sums):
                where = builder.add(column, builder.mul(a_row, _INT64(r)))
                left = splat(builder, load(builder, where, FLOAT, 4), LANES)
                for vector, slot in zip(right, slots, strict=True):
                    builder.store(emit_fma(builder, left, vector, builder.load(slot)), slot)
        for row, slots in zip(places, sums, strict=True):
            for place, slot in zip(row, slots, strict=True):
                store(builder, builder.load(slot), place, 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def typed(_typing: Any, a, b, out, depth, a_row, a_column, b_row, out_row):  # type: ignore[no-untyped-def]
        arguments = (a, b, out, depth, a_row, a_column, b_row, out_row)
        if any(argument != types.int64 for argument in arguments):
            return None
        return types.void(*[types.int64] * len(arguments)), codegen

    return intrinsic(typed)


_wide, _narrow = _product(WIDE), _product(1)


@njit(cache=True, nogil=True)
def add_product(a, b, out, transposed, causal):  # type: ignore[no-untyped-def]
    """``out += a b``, float32 (M, K) (K, N), C-contiguous, M a multiple of 4 and N of 16.

    ``transposed``: a is stored as (K, M). ``causal``: a[m, k] is zero for k > m and not read beyond its tile.
    """
    rows, columns = out.shape
    step = types.int64(4)
    a_row, a_column = (step, step * a.shape[1]) if transposed else (step * a.shape[1], step)
    left, right, result = types.int64(a.ctypes.data), types.int64(b.ctypes.data), types.int64(out.ctypes.data)
    stride = types.int64(step * columns)
    for row in range(0, rows, ROWS):
        depth = types.int64(min(b.shape[0], row + ROWS) if causal else b.shape[0])
        here, into = types.int64(left + a_row * row), types.int64(result + stride * row)
        column = 0
        while column + WIDE * LANES <= columns:
            shift = types.int64(step * column)
            _wide(here, right + shift, into + shift, depth, a_row, a_column, stride, stride)
            column += WIDE * LANES
        while column < columns:
            shift = types.int64(step * column)
            _narrow(here, right + shift, into + shift, depth, a_row, a_column, stride, stride)
            column += LANES
