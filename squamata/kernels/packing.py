"""Weight packing: canonical int4 bytes for the checkpoint, and the 16-row tiles the CPU kernels read.

**Canonical** (on disk): int8 is row-major ``(N, K)``; int4 is ``uint8 (N, ceil(K / 2))``, even k in the low nibble,
each value in two's complement.

**Stream** (on disk, of tables): codes 0 .. 2^b - 1 of b bits, uint8 ``(N, b ceil(K / 8))``: eight codes make b bytes,
bit i of code k is bit b k + i, counted from the lowest of the first byte; a last group is filled up with zeros.

**Flagged** (in memory): the 5 bits of a dual-scale code, uint8 ``(..., ceil(K / 2) + ceil(K / 8))``: the values of a
row as int4 bytes, then its flags, element k in bit k % 8 of byte k // 8.

**Tiles** (in memory, CPU): 16 rows side by side. A line of 64 bytes is 16 lanes of 32 bits, lane = row, and a lane
holds consecutive k of that row: one float32, two bfloat16, four int8, or eight int4 (low nibbles k..k+3, high
nibbles k+4..k+7, each stored as value + 8). The lines of a tile follow each other, tiles follow each other: one
stream from memory, and sixteen dot products advance at once without a horizontal sum. Rows are padded to 16 and
lines to 4 (the number of accumulators) with zeros.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

ROWS = 16
UNROLL = 4
LINE_BYTES = 64
PAGE, HUGE_PAGE = 4 << 10, 2 << 20
WIDEST_SPLIT = 4096  # columns: 15 * 32639 * 4096 is below 2^31
ARENA_BYTES = 8 * HUGE_PAGE


class Kind(IntEnum):
    """Weights x activations of a matrix-vector product."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3
    INT8_INT8 = 4
    INT4_INT8 = 5
    INT4_INT16 = 6  # float activations, which enter as 16-bit integers

    @property
    def integer_activations(self) -> bool:
        return self in (Kind.INT8_INT8, Kind.INT4_INT8)

    @property
    def splits(self) -> bool:
        """Float activations enter as 16-bit integers, a high and a low byte each."""
        return self == Kind.INT4_INT16

    @property
    def integer_sums(self) -> bool:
        return self.integer_activations or self.splits

    @property
    def lane_bytes(self) -> int:
        """Bytes of the activations that meet a lane."""
        return self.values_per_lane * (1 if self.integer_activations else 2 if self.splits else 4)

    @property
    def values_per_lane(self) -> int:
        """How many consecutive k a 32-bit lane holds."""
        return {Kind.FLOAT32: 1, Kind.BFLOAT16: 2, Kind.INT4: 8, Kind.INT4_INT8: 8, Kind.INT4_INT16: 8}.get(self, 4)


@dataclass(frozen=True)
class PackedLinear:
    """A weight matrix (rows N, columns K) as tiles.

    ``tiles``: uint32 (T, lines, 16). ``scale``: float32 (16 T,), per row; ones where the weight has none or has
    scales per group. ``groups``: int4, float32 (T, lines / group_lines, 16). ``row_sums``: int8 x int8, int32
    (16 T,), 128 times the sum of the row. ``bias``: float32 (16 T,) or None.
    """

    kind: Kind
    rows: int
    columns: int
    tiles: NDArray[np.uint32]
    scale: NDArray[np.float32]
    group_lines: int
    groups: NDArray[np.float32] | None = None
    row_sums: NDArray[np.int32] | None = None
    bias: NDArray[np.float32] | None = None

    @property
    def padded_columns(self) -> int:
        """Length of the activation row the kernel reads; elements from K on must be zero."""
        return self.tiles.shape[1] * self.kind.values_per_lane

    @property
    def padded_rows(self) -> int:
        return self.tiles.shape[0] * ROWS


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Canonical int4 bytes: int8 (..., K) with values -8..7 -> uint8 (..., ceil(K / 2)), low nibble = even k."""
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    nibbles = q.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Inverse of ``pack_int4``: uint8 (..., ceil(K / 2)) -> int8 (..., K)."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :columns]
    return (nibbles ^ 8).to(torch.int8) - 8


def pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 .. 2^bits - 1, int8 (..., K) -> uint8 (..., bits ceil(K / 8)), bits at most 7."""
    eights = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).long()
    words = (eights << bits * torch.arange(8, device=codes.device)).sum(-1, keepdim=True)
    return ((words >> 8 * torch.arange(bits, device=codes.device)) & 255).to(torch.uint8).flatten(-2)


def unpack_stream(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of ``pack_stream``: int8 (..., K)."""
    groups = packed.unflatten(-1, (-1, bits)).long()
    words = (groups << 8 * torch.arange(bits, device=packed.device)).sum(-1, keepdim=True)
    codes = (words >> bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.int8).flatten(-2)[..., :columns]


def pack_flagged(codes: torch.Tensor) -> torch.Tensor:
    """Dual-scale codes -14..14 (magnitudes above 7: a flag and the rest) -> uint8, see the module's text."""
    flags = codes.abs() > 7
    values = (codes - 7 * codes.sign() * flags).to(torch.int8)
    places = torch.nn.functional.pad(flags, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return torch.cat([pack_int4(values), (places * weights).sum(-1, dtype=torch.uint8)], dim=-1)


def unpack_flagged(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Inverse of ``pack_flagged``: uint8 -> int8 (..., K)."""
    values, bits = packed[..., : -(-columns // 2)], packed[..., -(-columns // 2) :]
    codes = unpack_int4(values, columns)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :columns].to(torch.int8)
    return codes + 7 * codes.sign() * flags


class _Arena:
    """Memory on huge pages, handed out from front to back; lives as long as any array made from it."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        where = np.frombuffer(self.memory, np.uint8).ctypes.data
        self.next = -where % HUGE_PAGE
        self.end = self.next + size

    def take(self, count: int, dtype: type) -> NDArray | None:
        """``count`` elements, or None if they do not fit."""
        size = count * np.dtype(dtype).itemsize
        if self.next + size > self.end:
            return None
        array: NDArray = np.frombuffer(self.memory, dtype, count, self.next)
        self.next += -(-size // PAGE) * PAGE
        return array


_arenas: list[_Arena] = []  # the one being filled


def allocate(count: int, dtype: type) -> NDArray:
    """Zeroed, page-aligned array of ``count`` elements, next to the one before it and on huge pages where the system
    has them: weights in pages of 4 KiB stream from memory at half the rate.
    """
    array = _arenas[0].take(count, dtype) if _arenas else None
    if array is None:
        size = max(ARENA_BYTES, -(-count * np.dtype(dtype).itemsize // HUGE_PAGE) * HUGE_PAGE)
        arena = _Arena(size)
        array = arena.take(count, dtype)
        assert array is not None
        _arenas[:] = [arena]
    return array


def tile_float32(weight: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> PackedLinear:
    """Tiles of a float32 (N, K) matrix."""
    weight = np.ascontiguousarray(weight, np.float32)
    return _packed(Kind.FLOAT32, weight.shape, weight.view(np.uint32), bias=bias)


def tile_bfloat16(weight: NDArray[np.uint16], bias: NDArray[np.float32] | None = None) -> PackedLinear:
    """Tiles of a bfloat16 (N, K) matrix given as its bits in uint16."""
    if weight.dtype != np.uint16:
        raise TypeError("bfloat16 weights are passed as their uint16 bits")
    lanes = _pad_columns(weight, 2).view(np.uint32)
    return _packed(Kind.BFLOAT16, weight.shape, lanes, bias=bias)


def tile_int8(
    q: NDArray[np.int8],
    scale: NDArray[np.float32] | float = 1.0,
    bias: NDArray[np.float32] | None = None,
    integer_activations: bool = True,
) -> PackedLinear:
    """Tiles of an int8 (N, K) matrix; ``scale`` is per row (N,) or one number."""
    lanes = _pad_columns(np.ascontiguousarray(q, np.int8), 4).view(np.uint32)
    kind = Kind.INT8_INT8 if integer_activations else Kind.INT8
    sums = 128 * q.sum(1, dtype=np.int32) if integer_activations else None
    return _packed(kind, q.shape, lanes, scale=scale, row_sums=sums, bias=bias)


def tile_int4(
    q: NDArray[np.int8],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    integer_activations: bool = True,
    group: int | None = None,
    sixteen_bits: bool = False,
) -> PackedLinear:
    """Tiles of an int4 matrix given as int8 (N, K), values -8..7, with scales (N, ceil(K / group)).

    ``group`` is a multiple of 32, or None for a scale per row (N,). Raises ValueError for another group size.
    ``sixteen_bits``: float activations are to enter as 16-bit integers.
    """
    rows, columns = q.shape
    width = 8 * UNROLL
    row_scale: NDArray[np.float32] | float = 1.0
    if group is None:
        parts = -(-columns // WIDEST_SPLIT) if sixteen_bits else 1
        group = -(-columns // (parts * width)) * width
        row_scale, scale = np.asarray(scale, np.float32).reshape(-1), np.ones((rows, -(-columns // group)), np.float32)
    if group % width:
        raise ValueError(f"int4 groups are multiples of {width} columns, not {group}")
    q = _pad_columns(np.ascontiguousarray(q, np.int8), group)
    scale = np.asarray(scale, np.float32).reshape(rows, -1)
    if sixteen_bits:
        parts = _parts(group // width)
        group, scale = group // parts, np.repeat(scale, parts, axis=1)
    codes = (q + np.int8(8)).view(np.uint8).reshape(rows, -1, 2, 4)
    lanes = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(rows, -1).view(np.uint32)
    kind = Kind.INT4_INT8 if integer_activations else Kind.INT4_INT16 if sixteen_bits else Kind.INT4
    if scale.shape[1] != q.shape[1] // group:
        raise ValueError(f"{q.shape[1] // group} scales a row expected, {scale.shape[1]} given")
    return _packed(kind, (rows, columns), lanes, row_scale, scale, group // 8, bias=bias)


def _parts(blocks: int) -> int:
    """Into how many equal parts a group goes so that int32 holds the sums of 16-bit activations."""
    most = WIDEST_SPLIT // (8 * UNROLL)
    return next(parts for parts in range(1, blocks + 1) if blocks % parts == 0 and blocks // parts <= most)


def _pad_columns(matrix: NDArray, multiple: int) -> NDArray:
    missing = -matrix.shape[1] % multiple
    return np.ascontiguousarray(np.pad(matrix, ((0, 0), (0, missing))) if missing else matrix)


def _packed(
    kind: Kind,
    shape: tuple[int, ...],
    lanes: NDArray[np.uint32],
    scale: NDArray[np.float32] | float = 1.0,
    groups: NDArray[np.float32] | None = None,
    group_lines: int = 0,
    row_sums: NDArray[np.int32] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> PackedLinear:
    """Lay (N, lines) lanes out as tiles and pad everything that is per row."""
    rows = shape[0]
    tiles = -(-rows // ROWS)
    padded_rows = tiles * ROWS
    lanes = _pad_columns(lanes, UNROLL)

    def per_row(values: NDArray | float, fill: float, dtype: type) -> NDArray:
        padded = allocate(padded_rows, dtype)
        padded[:] = fill
        padded[:rows] = values
        return padded

    out = allocate(tiles * lanes.shape[1] * ROWS, np.uint32).reshape(tiles, lanes.shape[1], ROWS)
    if kind in (Kind.INT4, Kind.INT4_INT8, Kind.INT4_INT16):
        out[:] = 0x88888888  # zero is stored as 8
    full = rows // ROWS
    out[:full] = lanes[: full * ROWS].reshape(full, ROWS, lanes.shape[1]).transpose(0, 2, 1)
    if full < tiles:
        out[full, :, : rows - full * ROWS] = lanes[full * ROWS :].T
    tiled_groups = None
    if groups is not None:
        tiled_groups = allocate(padded_rows * groups.shape[1], np.float32).reshape(tiles, groups.shape[1], ROWS)
        padded_groups = np.pad(groups, ((0, padded_rows - rows), (0, 0)))
        tiled_groups[:] = padded_groups.reshape(tiles, ROWS, -1).transpose(0, 2, 1)
    return PackedLinear(
        kind=kind,
        rows=rows,
        columns=shape[1],
        tiles=out,
        scale=per_row(scale, 0.0, np.float32),
        group_lines=group_lines or lanes.shape[1],
        groups=tiled_groups,
        row_sums=None if row_sums is None else per_row(row_sums, 0, np.int32),
        bias=None if bias is None else per_row(bias, 0.0, np.float32),
    )
