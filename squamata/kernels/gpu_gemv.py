# mypy: allow-untyped-defs
"""Matrix-vector products for a few rows: packed weights streamed once, results landed on the sites of their rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu_math import dot4, let_next_start, nibble_to_float, small_to_float, to_codes, wait_for_previous
from squamata.kernels.gpu_tiles import Format, TiledLinear

INTERPRETED = not isinstance(dot4, triton.runtime.JITFunction)
MOST_QUADS = 20  # that a thread loads before it uses the first: 80 registers
# For products of no more programs than run at once if their threads need fewer registers: a second wave costs a whole
# latency. Where there are several waves anyway, as at 8B, more in flight is faster (whole decode steps on one H200).
FEW_PROGRAMS = 400
FEW_QUADS = {Format.INT8_INT8: 10, Format.INT4_INT16: 5}
FEW_ROWS = 8  # up to which the activations of every row are applied to a weight while it is in registers


@dataclass(frozen=True)
class Landing:
    """Where the rows of a product go. All float32 (padded rows,): ``inverse`` 0 means that the row stays float;
    ``scale`` is for those who read a landed row as values.

    Rows ``ring_start`` to ``ring_stop`` go into slot ``position % slots`` of the convolution's ring.
    """

    inverse: Tensor
    low: Tensor
    high: Tensor
    rounding: int = 0
    ring_start: int = 0
    ring_stop: int = 0
    slots: int = 1
    any_codes: bool = True
    any_values: bool = True
    ring_codes: bool = True
    scale: Tensor | None = None

    @property
    def codes_everywhere(self) -> bool:
        """True if no row stays float: then stores need no mask that depends on data."""
        return self.any_codes and not self.values_anywhere

    @property
    def values_anywhere(self) -> bool:
        """True if any row stays float, in the ring or outside."""
        return self.any_values or (self.ring_stop > self.ring_start and not self.ring_codes)


@triton.jit
def _load_quads(words, first, STEP: tl.constexpr, QUADS: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr,
                S: tl.constexpr):  # fmt: skip
    """COUNT tiles of int32 [BN, S, 4]: quad ``first + i`` of each of S slices that are STEP quads apart.

    Rows come first because Triton spreads a warp over the last dimension, then over the first.
    """
    slices = tl.arange(0, S)[None, :, None] * STEP
    inside = tl.arange(0, BN)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    tiles = ()
    for i in tl.static_range(COUNT):
        tile = tl.load(words + (slices + (first + i)) * (BN * 4) + inside, eviction_policy="evict_first")
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _into_cache(x, LENGTH: tl.constexpr):
    """Read an activation row (32-bit words) as a whole into the first-level cache.

    The products then read it four words at a time, the same in every lane: such reads would each wait for the second
    level, one sector after the other.
    """
    BLOCK: tl.constexpr = 2048
    for start in tl.static_range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        words = tl.load(x + at, mask=at < LENGTH)
        tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _quad_times_row(tile, accumulator, x, quads, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """accumulator [BN, S, 4] + products of one quad a slice with activations ``x`` (of one row); quads [1, S, 1]."""
    lane = tl.arange(0, 4)[None, None, :]
    if FORMAT == 0:
        accumulator = dot4(tile, tl.load(x + quads * 4 + lane), accumulator, NATIVE)
    if FORMAT == 1 or FORMAT == 6:
        low, high = (tile << 4) & -0x0F0F0F10, tile & -0x0F0F0F10  # 0xF0F0F0F0
        accumulator = dot4(low, tl.load(x + quads * 8 + lane), accumulator, NATIVE)
        accumulator = dot4(high, tl.load(x + quads * 8 + 4 + lane), accumulator, NATIVE)
    if FORMAT == 2:
        for place in tl.static_range(8):
            accumulator += nibble_to_float(tile, place) * tl.load(x + quads * 32 + 4 * place + lane)
    if FORMAT == 3:
        accumulator += (tile << 16).to(tl.float32, bitcast=True) * tl.load(x + quads * 8 + lane)
        accumulator += (tile & -65536).to(tl.float32, bitcast=True) * tl.load(x + quads * 8 + 4 + lane)
    if FORMAT == 4:
        accumulator += tile.to(tl.float32, bitcast=True) * tl.load(x + quads * 4 + lane)
    if FORMAT == 5:
        for byte in tl.static_range(4):
            code = ((tile << (24 - 8 * byte)) >> 24).to(tl.float32)
            accumulator += code * tl.load(x + quads * 16 + 4 * byte + lane)
    return accumulator


@triton.jit
def _store(y, row, n, factor_tables, codes, values, ring_codes, ring_values, position, N, RING_START: tl.constexpr,
           RING_STOP: tl.constexpr, SLOTS: tl.constexpr, ROUNDING: tl.constexpr, ANY_CODES: tl.constexpr,
           ANY_VALUES: tl.constexpr, RING_CODES: tl.constexpr, rows):  # fmt: skip
    """Land y [BN], the outputs ``n`` of activation row ``row``."""
    inverse, low, high = factor_tables
    inside = n < N
    channels: tl.constexpr = RING_STOP - RING_START
    in_ring = inside & (n >= RING_START) & (n < RING_STOP)
    to_codes_mask = inside & (inverse != 0)
    plain = inside & ~in_ring if channels > 0 else inside
    code = to_codes(y, inverse, low, high, ROUNDING) if ANY_CODES else y
    if channels > 0:
        slot = tl.load(position) % SLOTS
        place = (slot * rows + row) * channels + (n - RING_START)
        if RING_CODES:
            tl.store(ring_codes + place, code.to(tl.int8), mask=in_ring)
        else:
            tl.store(ring_values + place, y, mask=in_ring)
    if ANY_CODES:
        tl.store(codes + row * N + n, code.to(tl.int8), mask=plain & to_codes_mask)
    if ANY_VALUES:
        tl.store(values + row * N + n, y, mask=plain & (inverse == 0))


@triton.jit
def _gemv(x, x_scale, words, group_scale, factor, bias, inverse, low, high, codes, values, ring_codes, ring_values,
          position, N, rows, X_STRIDE: tl.constexpr, X_LENGTH: tl.constexpr, QUADS: tl.constexpr,
          QUADS_PER_SCALE: tl.constexpr,
          SAME: tl.constexpr, COUNT: tl.constexpr, ROUNDS: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
          ROWS: tl.constexpr,
          FORMAT: tl.constexpr, GROUPED: tl.constexpr, DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr,
          RING_START: tl.constexpr, RING_STOP: tl.constexpr, SLOTS: tl.constexpr, ROUNDING: tl.constexpr,
          ANY_CODES: tl.constexpr, ANY_VALUES: tl.constexpr, RING_CODES: tl.constexpr, NATIVE: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """One tile of BN output rows for ROWS activation rows; S slices of K side by side, each COUNT * ROUNDS quads.

    SAME neighbouring quads share a scale and are summed before it is applied. Activations of 16 bits (FORMAT 6) are two
    rows of int8, X_LENGTH words apart: 256 times the first plus the second.
    """
    tile = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    STEP: tl.constexpr = COUNT * ROUNDS
    n = tile * BN + tl.arange(0, BN)
    tile_words = words + tile.to(tl.int64) * (QUADS * BN * 4)
    tiles = _load_quads(tile_words, 0, STEP, QUADS, COUNT, BN, S)
    scales = ()
    if GROUPED:
        for block in tl.static_range(STEP // SAME):
            group = (tl.arange(0, S) * STEP + block * SAME) // QUADS_PER_SCALE
            place = (tile * (QUADS // QUADS_PER_SCALE) + group[None, :, None]) * BN + tl.arange(0, BN)[:, None, None]
            scales = scales + (tl.load(group_scale + place),)  # type: ignore[assignment]  # noqa: RUF005
    scale_factor = tl.load(factor + n)
    shift = tl.load(bias + n) if HAS_BIAS else scale_factor
    tables = (tl.load(inverse + n), tl.load(low + n), tl.load(high + n)) if ANY_CODES else (0.0 * scale_factor, 0, 0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    slices = tl.arange(0, S)
    integer: tl.constexpr = FORMAT < 2
    halves: tl.constexpr = FORMAT == 6
    if NATIVE:
        _into_cache(x + first_row * X_STRIDE, X_LENGTH * (2 if halves else 1))
    for b in tl.static_range(ROWS):
        total = tl.zeros((BN, S, 1), tl.float32)
        whole = tl.zeros((BN, S, 1), tl.int32)
        row = first_row + b
        x_row = x + tl.minimum(row, rows - 1) * X_STRIDE
        for around in tl.static_range(ROUNDS):
            if around > 0 or (b > 0 and ROUNDS > 1):
                tiles = _load_quads(tile_words, around * COUNT, STEP, QUADS, COUNT, BN, S)
            for block in tl.static_range(COUNT // SAME):
                sums = tl.zeros((BN, S, 4), tl.int32 if integer or halves else tl.float32)
                lower = tl.zeros((BN, S, 4), tl.int32)
                for i in tl.static_range(SAME):
                    quads = (slices * STEP + (around * COUNT + block * SAME + i))[None, :, None]
                    sums = _quad_times_row(tiles[block * SAME + i], sums, x_row, quads, FORMAT, NATIVE)
                    if halves:
                        lower = _quad_times_row(tiles[block * SAME + i], lower, x_row + X_LENGTH, quads, FORMAT, NATIVE)
                part = tl.sum(sums, axis=2, keep_dims=True)
                if halves:
                    part = small_to_float(part) * 256.0 + small_to_float(tl.sum(lower, axis=2, keep_dims=True))
                if GROUPED:
                    scale = scales[(around * COUNT) // SAME + block].to(tl.float32)  # type: ignore[var-annotated]
                    if integer:
                        total += small_to_float(part) * scale
                    else:
                        total += part * scale
                elif integer:
                    whole += part
                else:
                    total += part
        if integer and not GROUPED:
            y = tl.sum(tl.reshape(whole, (BN, S)), axis=1).to(tl.float32)
        else:
            y = tl.sum(tl.reshape(total, (BN, S)), axis=1)
        y = y * (tl.load(x_scale + row) * scale_factor if DYNAMIC else scale_factor)
        if HAS_BIAS:
            y = y + shift
        if row < rows:
            _store(y, row, n, tables, codes, values, ring_codes, ring_values, position, N, RING_START, RING_STOP, SLOTS,
                   ROUNDING, ANY_CODES, ANY_VALUES, RING_CODES, rows)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How a product is cut: ``tile_rows`` rows a program, ``slices`` of K side by side."""

    tile_rows: int
    slices: int


def choose_shape(rows: int, columns: int, format: Format) -> Shape:
    """The cut for a weight (rows, columns).

    A rule that comes within a tenth of the best cut of every shape measured (H200, docs/log.md): 256 threads a program
    where K allows it, three quads a thread at least, some 200 programs at least.
    """
    quads = columns // format.quad
    tall = format.integer_activations or format == Format.INT4_INT16
    tile_rows = next((size for size in (32, 16) if tall and rows // size >= (256 if size == 32 else 200)), 8)
    slices = 1
    while quads % (2 * slices) == 0 and quads // (2 * slices) >= 3 and slices * tile_rows < 256:
        slices *= 2
    while slices * tile_rows < 32 and quads % (2 * slices) == 0:
        slices *= 2
    return Shape(tile_rows, slices)


def gemv(
    x: Tensor,
    x_scale: Tensor | None,
    linear: TiledLinear,
    factor: Tensor,
    landing: Landing | None,
    codes: Tensor | None,
    values: Tensor | None,
    ring: Tensor | None,
    position: Tensor,
    shape: Shape,
    pdl: bool,
) -> None:
    """y = W x, each row times ``factor`` (and ``x_scale`` (rows,) if dynamic), plus bias, landed.

    ``x``: int8 or float32 (rows, K), rows 4-byte aligned; two int8 rows of K side by side for INT4_INT16. ``codes``
    int8 and ``values`` float32: (rows, N), one of them may be None.
    """
    rows = x.shape[0]
    quads_per_slice = linear.quads // shape.slices
    few = linear.words.shape[0] <= FEW_PROGRAMS
    most = FEW_QUADS.get(linear.format, MOST_QUADS) if few else MOST_QUADS
    count = max(size for size in range(1, most + 1) if quads_per_slice % size == 0)
    grouped = linear.group_scale is not None
    halves = linear.format == Format.INT4_INT16
    same = gcd(linear.quads_per_scale, count, 8) if grouped or halves else count  # 8: integer sums stay below 2^22
    integer = linear.format.integer_activations or halves
    per_program = 1 if rows == 1 else min(FEW_ROWS, triton.next_power_of_2(rows))
    activations = x.view(torch.int32) if integer else x
    fallback = codes if codes is not None else values
    land = landing
    _gemv[(linear.words.shape[0], triton.cdiv(rows, per_program))](
        activations, x_scale if x_scale is not None else factor, linear.words,
        linear.group_scale if grouped else factor, factor, linear.bias if linear.bias is not None else factor,
        land.inverse if land else factor, land.low if land else factor, land.high if land else factor,
        codes if codes is not None else fallback, values if values is not None else fallback,
        ring if ring is not None else fallback, ring if ring is not None else fallback, position, linear.rows, rows,
        X_STRIDE=x.stride(0) // 4 if integer else x.stride(0),
        X_LENGTH=linear.columns // 4 if integer else linear.columns, QUADS=linear.quads,
        QUADS_PER_SCALE=linear.quads_per_scale, SAME=same, COUNT=count,
        ROUNDS=quads_per_slice // count, BN=linear.tile_rows, S=shape.slices, ROWS=per_program,
        FORMAT=int(linear.format), GROUPED=grouped, DYNAMIC=x_scale is not None, HAS_BIAS=linear.bias is not None,
        RING_START=land.ring_start if land else 0, RING_STOP=land.ring_stop if land else 0,
        SLOTS=land.slots if land else 1, ROUNDING=land.rounding if land else 0,
        ANY_CODES=land.any_codes if land else False, ANY_VALUES=land.any_values if land else True,
        RING_CODES=land.ring_codes if land else False, NATIVE=not INTERPRETED, PDL=pdl,
        num_warps=max(1, shape.slices * linear.tile_rows // 32), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
