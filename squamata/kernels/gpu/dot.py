# mypy: allow-untyped-defs
"""The programs of a matrix-vector product: packed weights streamed once, results landed on the sites of their rows.

They are kernels by themselves (``gpu.gemv``) or the beginning of another kernel's programs (``gpu.scan``).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from squamata.kernels.gpu.conv import conv_history, conv_tables, convolve
from squamata.kernels.gpu.math import (
    dot4,
    let_next_start,
    nibble_to_float,
    silu,
    small_to_float,
    to_codes,
    wait_for_previous,
)


@triton.jit
def _load_quads(first, COUNT: tl.constexpr, BN: tl.constexpr):
    """COUNT neighbouring quads from ``first`` on [BN, S, 4].

    Rows come first because Triton spreads a warp over the last dimension, then over the first.
    """
    tiles = ()
    for i in tl.static_range(COUNT):
        tile = tl.load(first + i * (BN * 4), eviction_policy="evict_first")
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _into_cache(x, LENGTH: tl.constexpr):
    """Read an activation row (32-bit words) as a whole into the first-level cache.

    The products then read it four words at a time, the same in every lane: such reads would each wait for the second
    level, one sector after the other. On a GPU it does not do that yet: the assembler drops these reads (docs/log.md).
    """
    BLOCK: tl.constexpr = 2048
    for start in tl.static_range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        words = tl.load(x + at, mask=at < LENGTH)
        tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _quad_times_row(tile, accumulator, x, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """accumulator [BN, S, 4] + products of one quad a slice with the activations from ``x`` [1, S, 4] on."""
    if FORMAT == 0:
        accumulator = dot4(tile, tl.load(x), accumulator, NATIVE)
    if FORMAT == 1 or FORMAT == 6:
        low, high = (tile << 4) & -0x0F0F0F10, tile & -0x0F0F0F10  # 0xF0F0F0F0
        accumulator = dot4(low, tl.load(x), accumulator, NATIVE)
        accumulator = dot4(high, tl.load(x + 4), accumulator, NATIVE)
    if FORMAT == 2:
        for place in tl.static_range(8):
            accumulator += nibble_to_float(tile, place) * tl.load(x + 4 * place)
    if FORMAT == 3:
        accumulator += (tile << 16).to(tl.float32, bitcast=True) * tl.load(x)
        accumulator += (tile & -65536).to(tl.float32, bitcast=True) * tl.load(x + 4)
    if FORMAT == 4:
        accumulator += tile.to(tl.float32, bitcast=True) * tl.load(x)
    if FORMAT == 5:
        for byte in tl.static_range(4):
            code = ((tile << (24 - 8 * byte)) >> 24).to(tl.float32)
            accumulator += code * tl.load(x + 4 * byte)
    return accumulator


@dataclass(frozen=True)
class Cut:
    """What the kernel of a product is compiled for: S ``slices`` of K side by side, each ``count`` * ``rounds`` quads.

    ``same`` neighbouring quads share a scale and are summed before it is applied. Activations of 16 bits are two rows
    of int8, ``x_length`` words apart: 256 times the first plus the second; ``block`` neighbouring ones share a scale
    (0: the row). ``x_quad``: words of them that meet a quad. ``rows``: activation rows a program.
    ``norm_groups``: of ``norm_width`` activations each, whose norm is still to be applied (0: none); their squares come
    summed in ``norm_parts`` parts a group (``norm_padded``: the next power of two).
    ``gate``: what is stored is SiLU(y), y as its site represents it, instead of y. ``width``: slots of the ring and
    taps of the convolution that its channels, ``split`` of u first, go through at once (1: none); ``conv_codes``: its
    outputs are stored as codes.
    """

    format: int
    tile_rows: int
    slices: int
    count: int
    rounds: int
    same: int
    quads: int
    quads_per_scale: int
    block: int
    norm_groups: int
    norm_parts: int
    norm_padded: int
    norm_width: int
    rows: int
    x_stride: int
    x_length: int
    x_quad: int
    grouped: bool
    dynamic: bool
    has_bias: bool
    ring_start: int
    ring_stop: int
    width: int
    split: int
    conv_rounding: int
    conv_rounding_bc: int
    conv_codes: bool
    rounding: int
    any_codes: bool
    any_values: bool
    ring_codes: bool
    gate: bool
    native: bool

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return self.ring_stop - self.ring_start


@triton.jit
def _store(y, row, n, grid, out, N, rows, CUT: tl.constexpr):
    """Land y [BN], the outputs ``n`` of activation row ``row``, those outside the ring; -> y and codes of all."""
    inverse, low, high, scale = grid
    codes, values = out
    code = to_codes(y, inverse, low, high, CUT.rounding) if CUT.any_codes else y
    plain = n < N
    if CUT.channels > 0:
        plain = plain & ((n < CUT.ring_start) | (n >= CUT.ring_stop))
    if CUT.gate:
        represented = tl.where(inverse == 0, y, code * scale)
        tl.store(values + row * N + n, silu(represented), mask=plain)
    else:
        if CUT.any_codes:
            tl.store(codes + row * N + n, code.to(tl.int8), mask=plain & (inverse != 0))
        if CUT.any_values:
            tl.store(values + row * N + n, y, mask=plain & (inverse == 0))
    return code


@triton.jit
def _convolve_rows(newest, past, loaded, convolution, now, row, channel, mask, rows, CUT: tl.constexpr):
    """Put the newest inputs (codes or values) of some channels into the ring, and through the convolution."""
    ring, _, out = convolution
    C: tl.constexpr = CUT.channels
    place = ((now % CUT.width) * rows + row) * C + channel
    u = convolve(past, newest, loaded, channel, CUT.split, CUT.conv_rounding, CUT.conv_rounding_bc, CUT.conv_codes)
    tl.store(ring + place, newest.to(ring.dtype.element_ty), mask=mask)
    tl.store(out + row * C + channel, u.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _half_quad(tile, side: tl.constexpr, x, CUT: tl.constexpr):
    """Sums [BN, S, 1] of 16 of the 32 products of a quad with activations in 16 bits from ``x`` [1, S, 4] on."""
    codes = tile << 4 if side == 0 else tile
    codes &= -0x0F0F0F10  # 0xF0F0F0F0
    nothing = tl.zeros(tile.shape, tl.int32)
    upper = tl.sum(dot4(codes, tl.load(x + 4 * side), nothing, CUT.native), axis=2, keep_dims=True)
    lower = tl.sum(dot4(codes, tl.load(x + 4 * side + CUT.x_length), nothing, CUT.native), axis=2, keep_dims=True)
    return small_to_float(upper) * 256.0 + small_to_float(lower)


@triton.jit
def _norm_of_slices(norm, row, CUT: tl.constexpr):
    """1 / root mean square of what every slice of K [1, S, 1] multiplies: a slice lies within a group."""
    squares, epsilon = norm
    GROUPS: tl.constexpr = CUT.norm_groups
    EACH: tl.constexpr = CUT.slices // GROUPS
    part = tl.arange(0, CUT.norm_padded)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    place = (row * GROUPS + group) * CUT.norm_parts + part
    total = tl.sum(tl.load(squares + place, mask=part < CUT.norm_parts, other=0.0), axis=1, keep_dims=True)
    factor = tl.rsqrt(total / CUT.norm_width + epsilon)
    return tl.reshape(tl.broadcast_to(factor, (GROUPS, EACH)), (1, CUT.slices, 1))


@triton.jit
def _row_sums(x_row, x_scale, row_norm, tiles, scales, first_words, RELOAD: tl.constexpr, CUT: tl.constexpr):
    """Sums [BN] of a tile's weights times one activation row. ``tiles``: the first ``count`` quads of every slice.

    ``x_scale``: of the row's blocks, if they have scales; ``row_norm``: what slices are multiplied with, if anything.

    Those of the next round are asked for as soon as these are used. RELOAD: the first are gone, for an earlier row.
    """
    BN: tl.constexpr = CUT.tile_rows
    S: tl.constexpr = CUT.slices
    COUNT: tl.constexpr = CUT.count
    ROUNDS: tl.constexpr = CUT.rounds
    SAME: tl.constexpr = CUT.same
    halves: tl.constexpr = CUT.format == 6
    integer: tl.constexpr = CUT.format < 2
    STRIDE: tl.constexpr = CUT.x_quad
    lane = tl.arange(0, 4)[None, None, :]
    x = x_row + tl.arange(0, S)[None, :, None] * (COUNT * ROUNDS * STRIDE) + lane
    HALF_QUADS: tl.constexpr = CUT.block == 16
    if CUT.block > 0:
        x_unit = x_scale + tl.arange(0, S)[None, :, None] * (COUNT * ROUNDS * 32 // CUT.block)
    total = tl.zeros((BN, S, 1), tl.float32)
    whole = tl.zeros((BN, S, 1), tl.int32)
    if RELOAD:
        tiles = _load_quads(first_words, COUNT, BN)
    for around in tl.static_range(ROUNDS):
        following = ()
        for block in tl.static_range(COUNT // SAME):
            sums = tl.zeros((BN, S, 4), tl.int32 if integer or halves else tl.float32)
            lower = tl.zeros((BN, S, 4), tl.int32)
            scaled = tl.zeros((BN, S, 1), tl.float32)
            for i in tl.static_range(SAME):
                at = x + (around * COUNT + block * SAME + i) * STRIDE
                tile = tiles[block * SAME + i]
                if HALF_QUADS:
                    for side in tl.static_range(2):
                        unit = tl.load(x_unit + 2 * (around * COUNT + block * SAME + i) + side)
                        scaled += _half_quad(tile, side, at, CUT) * unit
                else:
                    sums = _quad_times_row(tile, sums, at, CUT.format, CUT.native)
                if halves and not HALF_QUADS:
                    lower = _quad_times_row(tile, lower, at + CUT.x_length, CUT.format, CUT.native)
                if around + 1 < ROUNDS:
                    next_quad = first_words + ((around + 1) * COUNT + block * SAME + i) * (BN * 4)
                    following = following + _load_quads(next_quad, 1, BN)  # type: ignore[assignment]
            part = scaled if HALF_QUADS else tl.sum(sums, axis=2, keep_dims=True)
            if halves and not HALF_QUADS:
                part = small_to_float(part) * 256.0 + small_to_float(tl.sum(lower, axis=2, keep_dims=True))
            if CUT.block >= 32:
                part *= tl.load(x_unit + (around * COUNT + block * SAME) * 32 // CUT.block)
            if CUT.grouped:
                scale = scales[(around * COUNT) // SAME + block].to(tl.float32)  # type: ignore[var-annotated]
                total += (small_to_float(part) if integer else part) * scale
            elif integer:
                whole += part
            else:
                total += part
        tiles = following
    if integer and not CUT.grouped:
        return tl.sum(tl.reshape(whole, (BN, S)), axis=1).to(tl.float32)
    else:
        if CUT.norm_groups > 0:
            total *= row_norm
        return tl.sum(tl.reshape(total, (BN, S)), axis=1)


@triton.jit
def load_weights(operands, tile, CUT: tl.constexpr):
    """What a tile of output rows needs besides activations: first quads, scales of groups, factor and bias of rows."""
    _, _, words, group_scale, factor, bias, _, _, _, _, _, _ = operands
    BN: tl.constexpr = CUT.tile_rows
    S: tl.constexpr = CUT.slices
    STEP: tl.constexpr = CUT.count * CUT.rounds
    BLOCKS: tl.constexpr = STEP // CUT.same
    GROUPS: tl.constexpr = CUT.quads // CUT.quads_per_scale
    COUNT: tl.constexpr = CUT.count
    n = tile * BN + tl.arange(0, BN)
    slices = tl.arange(0, S)[None, :, None] * (STEP * BN * 4)
    inside = tl.arange(0, BN)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    first_words = words + tile.to(tl.int64) * (CUT.quads * BN * 4) + slices + inside
    tiles = _load_quads(first_words, COUNT, BN)
    scales = ()
    if CUT.grouped:
        for block in tl.static_range(BLOCKS):
            group = (tl.arange(0, S) * STEP + block * CUT.same) // CUT.quads_per_scale
            place = (tile * GROUPS + group[None, :, None]) * BN + tl.arange(0, BN)[:, None, None]
            scales = scales + (tl.load(group_scale + place),)  # type: ignore[assignment]  # noqa: RUF005
    scale_factor = tl.load(factor + n)
    shift = tl.load(bias + n) if CUT.has_bias else scale_factor
    return first_words, tiles, scales, scale_factor, shift


@triton.jit
def load_grid(operands, n, CUT: tl.constexpr):
    """inverse, low, high and scale of the sites of the outputs ``n``."""
    inverse, low, high, scale = operands[6]
    if CUT.any_codes:
        return tl.load(inverse + n), tl.load(low + n), tl.load(high + n), tl.load(scale + n)
    else:
        return n * 0.0, n * 0.0, n * 0.0, n * 0.0


@triton.jit
def row_product(operands, weights, row, RELOAD: tl.constexpr, CUT: tl.constexpr):
    """y [BN] of a tile for one activation row."""
    x, x_scale, _, _, _, _, _, _, _, norm, _, rows = operands
    first_words, tiles, scales, scale_factor, shift = weights
    row = tl.minimum(row, rows - 1)
    x_row = x + row * CUT.x_stride
    blocks = x_scale
    if CUT.block > 0:
        blocks = x_scale + row * (CUT.quads * 32 // CUT.block)
    row_norm = _norm_of_slices(norm, row, CUT) if CUT.norm_groups > 0 else 1.0
    y = _row_sums(x_row, blocks, row_norm, tiles, scales, first_words, RELOAD, CUT)
    y = y * (tl.load(x_scale + row) * scale_factor if CUT.dynamic else scale_factor)
    return y + shift if CUT.has_bias else y


@triton.jit
def product_tile(operands, position, tile, first_row, CUT: tl.constexpr, PDL: tl.constexpr):
    """One tile of output rows for some activation rows. ``operands``: as ``Product`` holds them."""
    x, x_scale, _, _, _, _, _, out, convolution, _, N, rows = operands
    ROWS: tl.constexpr = CUT.rows
    n = tile * CUT.tile_rows + tl.arange(0, CUT.tile_rows)
    weights = load_weights(operands, tile, CUT)
    grid = load_grid(operands, n, CUT)
    pasts = ()
    if CUT.channels > 0:
        now = tl.load(position)
        channel = n - CUT.ring_start
        in_ring = (n >= CUT.ring_start) & (n < CUT.ring_stop)
        loaded = conv_tables(convolution[1], channel, in_ring, CUT.channels, CUT.width)
        for b in tl.static_range(ROWS):
            row = tl.minimum(first_row + b, rows - 1)
            past = conv_history(convolution[1], convolution[0], channel, in_ring, now, row, rows, CUT.channels,
                                CUT.width)  # fmt: skip
            pasts = pasts + (past,)  # type: ignore[assignment]  # noqa: RUF005
    let_next_start(PDL)
    wait_for_previous(PDL)
    if CUT.native:
        _into_cache(x + first_row * CUT.x_stride, CUT.x_length * (2 if CUT.format == 6 else 1))
        if CUT.block > 0:
            BLOCKS: tl.constexpr = CUT.quads * 32 // CUT.block
            _into_cache(x_scale.to(tl.pointer_type(tl.int32)) + first_row * BLOCKS, BLOCKS)
    for b in tl.static_range(ROWS):
        row = first_row + b
        y = row_product(operands, weights, row, b > 0 and CUT.rounds > 1, CUT)
        if row < rows:
            code = _store(y, row, n, grid, out, N, rows, CUT)
            if CUT.channels > 0:
                newest = code if CUT.ring_codes else y
                _convolve_rows(newest, pasts[b], loaded, convolution, now, row, channel, in_ring, rows, CUT)
