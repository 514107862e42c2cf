"""int8 or float rows by int4 weights in groups of 128: the product of many rows, straight from the packed nibbles.

Sixteen rows of the weight stand side by side in the lanes of a register, as in ``packing``; a 32-bit word of the
canonical layout is eight columns of a row, even ones in the low nibbles, so the activations' columns are put in that
order instead of the weights'. Integers are exact; groups are added in increasing order as float32(sum) * scale, each
multiplied and added with its own rounding, as in the reference. Float activations enter as 16-bit integers, two rows of
int8 each (``halves``), whose sums meet again in int32 before a group is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from squamata.kernels.emit import dot_unsigned_signed, load, offset, splat, store
from squamata.kernels.halves import split_rows
from squamata.kernels.simd import FLOAT, INT32, constant, has_vnni

GROUP = 128
TILES, LANES = 3, 16  # tiles of sixteen rows that one task computes together
ROWS = TILES * LANES
TOKENS = 8  # activation rows a task takes at once: 16 sums in registers, and 36 KiB in use for K = 1536
MANY = 128  # activation rows from which threads share them instead of the weight's
LINES = GROUP // 8  # lines of 64 bytes of a tile in a group
_FLOATS, _INTS, _INT64 = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES), ir.IntType(64)
VNNI = has_vnni()


@intrinsic
def _transpose_words(_typing, words, row_bytes, out):  # type: ignore[no-untyped-def]
    """16 rows by 16 uint32 at an address, rows ``row_bytes`` apart -> 16 lines of a tile, nibbles as value + 8."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        words, row_bytes, out = arguments
        lines = []
        for row in range(LANES):
            line = load(builder, builder.add(words, builder.mul(row_bytes, _INT64(row))), _INTS, 1)
            lines.append(builder.xor(line, constant(_INTS, 0x88888888)))
        width = LANES // 2
        while width:
            for i in (i for i in range(LANES) if not i & width):
                a, b = lines[i], lines[i + width]
                low = [LANES + lane - width if lane & width else lane for lane in range(LANES)]
                high = [LANES + lane if lane & width else lane + width for lane in range(LANES)]
                lines[i] = builder.shuffle_vector(a, b, ir.Constant(_INTS, low))
                lines[i + width] = builder.shuffle_vector(a, b, ir.Constant(_INTS, high))
            width //= 2
        for number, line in enumerate(lines):
            store(builder, line, builder.add(out, _INT64(64 * number)), 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def _sum_group(_typing, codes):  # type: ignore[no-untyped-def]
    """8 * the sum of 128 int8 at an address, int32."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        total = constant(_INTS, 0)
        for half in range(GROUP // 64):
            line = load(builder, builder.add(arguments[0], _INT64(64 * half)), _INTS, 1)
            total = dot_unsigned_signed(builder, VNNI, total, constant(_INTS, 0x08080808), line)
        name = f"llvm.vector.reduce.add.v{LANES}i32"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(INT32, [_INTS]), name)
        return builder.call(function, (total,))

    return types.int32(types.int64), codegen


def _tile_product(halves: bool) -> Any:
    """Numba intrinsic: ``TOKENS`` rows of int8 by ``ROWS`` weight rows, added to the output.

    Arguments, int64: addresses of the activations (columns reordered), the tiles (TILES, groups * 16 lines), their
    scales float32 (groups, row), ``sums`` int32 (row, groups), the output float32; bytes from one row of each to the
    next for activations, scales and output; groups; address of ``steps``. With ``halves`` two rows after each other
    are the high and the low byte of one row of activations, which has one row of ``sums`` and output, and of
    ``steps``, float32 (row, groups): what 1 is worth in a group.
    """
    each = 2 if halves else 1

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        x, tiles, scales, sums, out, x_row, scale_row, out_row, groups, steps = arguments
        cells = [(token, tile) for token in range(TOKENS) for tile in range(TILES)]
        totals = {cell: cgutils.alloca_once(builder, _INTS) for cell in cells}
        tile_bytes = builder.mul(groups, _INT64(64 * LINES))
        with cgutils.for_range(builder, groups) as group:
            for slot in totals.values():
                builder.store(constant(_INTS, 0), slot)
            with cgutils.for_range(builder, _INT64(LINES)) as loop:
                line = builder.add(builder.mul(group.index, _INT64(LINES)), loop.index)
                _add_line(builder, totals, line, (x, x_row), (tiles, tile_bytes))
            own = builder.add(scales, builder.mul(scale_row, group.index))
            for row in range(TOKENS // each):
                at = builder.add(builder.mul(groups, _INT64(row)), group.index)
                bias = splat(builder, load(builder, offset(builder, sums, at, 4), INT32, 4))
                for tile in range(TILES):
                    total = builder.load(totals[each * row, tile])
                    factor = load(builder, builder.add(own, _INT64(64 * tile)), _FLOATS, 4)
                    if halves:
                        low = builder.load(totals[each * row + 1, tile])
                        total = builder.add(builder.shl(total, constant(_INTS, 8)), low)
                        step = splat(builder, load(builder, offset(builder, steps, at, 4), FLOAT, 4))
                        factor = builder.fmul(factor, step)
                    value = builder.fmul(builder.sitofp(builder.sub(total, bias), _FLOATS), factor)
                    where = builder.add(builder.add(out, builder.mul(out_row, _INT64(row))), _INT64(64 * tile))
                    store(builder, builder.fadd(load(builder, where, _FLOATS, 4), value), where, 4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def typed(_typing, x, tiles, scales, sums, out, x_row, scale_row, out_row, groups, steps):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 10), codegen

    return intrinsic(typed)


def _add_line(
    builder: ir.IRBuilder,
    totals: dict[tuple[int, int], ir.Value],
    line: ir.Value,
    activations: tuple[ir.Value, ir.Value],
    weights: tuple[ir.Value, ir.Value],
) -> None:
    """One line of every tile times its eight columns; operands: address, and bytes from one row or tile to the next."""
    x, x_row = activations
    tiles, tile_bytes = weights
    for nibble in (0, 1):
        lines = []
        for tile in range(TILES):
            where = offset(builder, builder.add(tiles, builder.mul(tile_bytes, _INT64(tile))), line, 64)
            data = load(builder, where, _INTS, 64)
            data = builder.lshr(data, constant(_INTS, 4)) if nibble else data
            lines.append(builder.and_(data, constant(_INTS, 0x0F0F0F0F)))
        for token in range(TOKENS):
            where = offset(builder, builder.add(x, builder.mul(x_row, _INT64(token))), line, 8, 4 * nibble)
            quad = splat(builder, load(builder, where, INT32, 4))
            for tile, data in enumerate(lines):
                slot = totals[token, tile]
                builder.store(dot_unsigned_signed(builder, VNNI, builder.load(slot), data, quad), slot)


_multiply_tile, _multiply_tile_halves = _tile_product(False), _tile_product(True)


@njit(cache=True, nogil=True, parallel=True)
def reorder(codes, out, sums):  # type: ignore[no-untyped-def]
    """Even columns of every eight before odd ones, and 8 * the sum of every 128: int8 rows as uint64 (M, K / 8)."""
    rows, words = codes.shape
    for row in prange(rows):
        source, target = codes[row], out[row]
        for j in range(words):
            target[j] = _bytes_apart(source[j]) | (_bytes_apart(source[j] >> np.uint64(8)) << np.uint64(32))
        where = types.int64(source.ctypes.data)
        for group in range(words // LINES):
            sums[row, group] = _sum_group(types.int64(where + group * GROUP))


@njit(cache=True, nogil=True)
def _bytes_apart(word):  # type: ignore[no-untyped-def]
    """Bytes 0, 2, 4, 6 of a uint64 as its low half."""
    word = word & np.uint64(0x00FF00FF00FF00FF)
    word = (word | (word >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
    return (word | (word >> np.uint64(16))) & np.uint64(0x00000000FFFFFFFF)


@njit(cache=True, nogil=True, parallel=True)
def multiply(x, sums, steps, weight, scales, origin, out, parts):  # type: ignore[no-untyped-def]
    """``x`` uint64 (M, K / 8) and ``sums`` (M, groups) from ``reorder``, ``weight`` canonical uint8 (N, K / 2),
    ``scales`` float32 (groups, N + ROWS) -> ``out`` float32 (M, n), the weight's rows from ``origin`` on; here M and
    n are padded to TOKENS and ROWS.

    With ``steps`` (M, groups), x has 2 M rows, from ``split_rows``; else ``steps`` is empty. Each of ``parts`` of the
    rows by itself: a thread's rows stay in its own cache for what lands them.
    """
    blocks, tokens = out.shape[1] // ROWS, TOKENS // 2 if steps.size else TOKENS
    turns = out.shape[0] // tokens
    for task in prange(parts * blocks):
        part, first = task // blocks, task % blocks * ROWS
        tiles = np.empty(TILES * weight.shape[1] * LANES + 64, np.uint8)
        where = (types.int64(tiles.ctypes.data) + 63) // 64 * 64
        _fill_tiles(weight, origin + first, where)
        scale = types.int64(scales.ctypes.data + 4 * (origin + first)), types.int64(4 * scales.shape[1])
        for turn in range(part * turns // parts, (part + 1) * turns // parts):
            _multiply_block(x, sums, steps, scale, out, turn * tokens, first, where)


@njit(cache=True, nogil=True)
def _fill_tiles(weight, first, where):  # type: ignore[no-untyped-def]
    """Rows ``first`` .. of the weight as tiles at an address; those beyond its end hold anything."""
    rows, row_bytes = weight.shape
    for tile in range(TILES):
        start = first + tile * LANES
        into = where + tile * row_bytes * LANES
        if start + LANES <= rows:
            _fill_tile(types.int64(weight.ctypes.data + start * row_bytes), row_bytes, into)
        elif start < rows:
            spare = np.zeros((LANES, row_bytes), np.uint8)
            spare[: rows - start] = weight[start:]
            _fill_tile(types.int64(spare.ctypes.data), row_bytes, into)


@njit(cache=True, nogil=True)
def _fill_tile(source, row_bytes, into):  # type: ignore[no-untyped-def]
    """Sixteen rows at an address as one tile at another."""
    for group in range(row_bytes // (4 * LINES)):
        shift = group * 4 * LINES
        _transpose_words(types.int64(source + shift), types.int64(row_bytes), types.int64(into + LANES * shift))


@njit(cache=True, nogil=True)
def _multiply_block(x, sums, steps, scales, out, row, first, tiles):  # type: ignore[no-untyped-def]
    """The activation rows of one tile product, from ``row`` on, into the columns from ``first`` on; ``scales``: address
    of these columns' scales in the first group, and bytes to those in the next."""
    groups = types.int64(sums.shape[1])
    scale, scale_row = scales
    x_row, out_row = types.int64(8 * x.shape[1]), types.int64(4 * out.shape[1])
    into = types.int64(out.ctypes.data + out_row * row + 4 * first)
    bias = types.int64(sums.ctypes.data + 4 * groups * row)
    if steps.size:
        out[row : row + TOKENS // 2, first : first + ROWS] = types.float32(0.0)
        source, step = types.int64(x.ctypes.data + 2 * x_row * row), types.int64(steps.ctypes.data + 4 * groups * row)
        _multiply_tile_halves(source, tiles, scale, bias, into, x_row, scale_row, out_row, groups, step)
    else:
        out[row : row + TOKENS, first : first + ROWS] = types.float32(0.0)
        source = types.int64(x.ctypes.data + x_row * row)
        _multiply_tile(source, tiles, scale, bias, into, x_row, scale_row, out_row, groups, types.int64(0))


class Rows(NamedTuple):
    """Activations as ``multiply`` takes them: ``filled`` of them, the rest is padding."""

    filled: int
    codes: NDArray[np.uint64]
    sums: NDArray[np.int32]
    steps: NDArray[np.float32]


class GroupedProduct:
    """Sum over groups of x_g . w_g * scale for one weight: canonical int4 (N, K / 2), K a multiple of 128, scales
    (N, K / 128)."""

    def __init__(self, weight: NDArray[np.uint8], scales: NDArray[np.float32]) -> None:
        self.weight, self.groups = weight, scales.shape[1]
        self._scales = np.zeros((self.groups, len(weight) + ROWS), np.float32)
        self._scales[:, : len(weight)] = scales.T

    def enter(self, x: NDArray) -> Rows:
        """int8 or float32 (M, K)."""
        rows, words, halves = len(x), x.shape[1] // 8, x.dtype == np.float32
        padded = padded_rows(rows)
        codes = np.empty((2 * padded if halves else padded, words), np.uint64)
        sums = np.empty((padded, self.groups), np.int32)
        steps = np.empty((padded if halves else 0, self.groups), np.float32)
        codes[2 * rows if halves else rows :], sums[rows:], steps[rows:] = 0, 0, 0
        if halves:
            split_rows(x, codes, sums, steps)
        else:
            reorder(x.view(np.uint64), codes, sums)
        return Rows(rows, codes, sums, steps)

    def multiply(self, rows: Rows, out: NDArray[np.float32], first: int = 0) -> None:
        """By the weight's rows from ``first`` on; ``out`` (padded M, n padded to ROWS)."""
        parts = numba.get_num_threads() if rows.filled >= MANY else 1
        multiply(*rows[1:], self.weight, self._scales, first, out[: len(rows.sums)], parts)


def padded_rows(rows: int) -> int:
    """Activation rows that there must be room for."""
    return -(-rows // TOKENS) * TOKENS
