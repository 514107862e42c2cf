# mypy: allow-untyped-defs
"""Matrix products for many rows on the tensor cores, from the same tiled weights that the matrix-vector kernel streams.

A product may sum its terms in any order as long as both operands agree: the activations are written in the order in
which the weights of a quad lie in memory (``permuted``), so that 16 bytes of a row meet 16 bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from squamata.kernels.gpu.gemv import INTERPRETED, Landing
from squamata.kernels.gpu.math import dot_float, small_to_float, softplus, to_codes
from squamata.kernels.gpu.tiles import Format, TiledLinear

PACKED = (Format.INT4_INT8, Format.INT4_FLOAT, Format.INT4_INT16)
LAND, RESIDUAL, SPLIT, SOFTPLUS, PLAIN = range(5)  # what becomes of a product: see ``Finish``


@dataclass(frozen=True)
class Config:
    """Rows of activations and of weights a program, depth of a step (weights), warps, steps in flight."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


# The best of sweeps on one H200, by activation rows: (up to, configuration). Small programs win: three or four of them
# share a multiprocessor, and one finishes while another multiplies.
_INT8 = [
    (64, Config(64, 64, 128, 4, 5)),
    (256, Config(128, 64, 128, 4, 4)),
    (2**31, Config(128, 128, 128, 4, 3)),
]
_INT4 = [(32, Config(32, 64, 128, 4, 4)), (2**31, Config(64, 128, 128, 4, 4))]
_FLOAT = [
    (64, Config(64, 64, 64, 4, 5)),
    (256, Config(128, 64, 64, 4, 4)),
    (2**31, Config(128, 128, 64, 4, 3)),
]
CONFIGS = {
    Format.INT8_INT8: _INT8,
    Format.INT4_INT8: _INT4,
    Format.INT4_FLOAT: _INT4,
    Format.INT4_INT16: _INT4,
    Format.BFLOAT16_FLOAT: _FLOAT,
    Format.FLOAT32_FLOAT: [(2**31, Config(32, 32, 32, 4, 2))],
    Format.INT8_FLOAT: _FLOAT,
}
_PROGRAMS = 128  # fewer than that leave multiprocessors idle
_NARROW = Config(64, 32, 128, 4, 5)
_SHALLOW = Config(128, 64, 64, 4, 3)
# Weights by rows, which are a product's left operand: 64 outputs or more
_ROWS = [
    (32, Config(32, 64, 256, 4, 4)),
    (128, Config(64, 64, 128, 4, 4)),
    (256, Config(64, 128, 128, 4, 3)),
    (2**31, Config(128, 128, 128, 4, 3)),
]
_ROWS_GROUPED = [
    (32, Config(32, 64, 128, 4, 5)),
    (128, Config(64, 64, 128, 4, 4)),
    (2**31, Config(128, 64, 128, 4, 3)),
]


def by_rows(linear: TiledLinear) -> bool:
    """True if every tile is one row of int8 weights."""
    return linear.tile_rows == 1 and linear.format == Format.INT8_INT8


def choose_config(linear: TiledLinear, rows: int) -> Config:
    """The committed configuration for a product; nothing is tuned at run time."""
    if by_rows(linear):
        return _filling(_ROWS if linear.group_scale is None else _ROWS_GROUPED, linear.rows, rows)
    if linear.format == Format.INT8_INT8 and linear.columns < 512 and rows > 64:
        return _SHALLOW
    found = _filling(CONFIGS[linear.format], linear.rows, rows)
    narrow = triton.cdiv(rows, found.rows) * triton.cdiv(linear.rows, found.outputs) < _PROGRAMS // 2
    return _NARROW if narrow and linear.format == Format.INT8_INT8 and rows > 64 else found


def _filling(table: list[tuple[int, Config]], outputs: int, rows: int) -> Config:
    """The table's configuration for so many rows, or an earlier one where that leaves too few programs."""
    at = next(index for index, (limit, _) in enumerate(table) if rows <= limit)
    while at > 0 and triton.cdiv(rows, table[at][1].rows) * triton.cdiv(outputs, table[at][1].outputs) < _PROGRAMS:
        at -= 1
    return table[at][1]


@triton.jit
def permuted(k, FORMAT: tl.constexpr):
    """Where the activation that meets weight ``k`` belongs in its row (``gpu.tiles`` has the orders)."""
    if FORMAT == 2:
        inside = k % 32
        k = k - inside + (inside // 4 % 2) * 16 + inside % 4 * 4 + inside // 8
    if FORMAT == 3:
        inside = k % 8
        k = k - inside + inside % 4 * 2 + inside // 4
    if FORMAT == 5:
        inside = k % 16
        k = k - inside + inside % 4 * 4 + inside // 4
    return k


@triton.jit
def unpermuted(place, FORMAT: tl.constexpr):
    """Which ``k`` belongs there: the inverse of ``permuted``."""
    if FORMAT == 2:
        inside = place % 32
        place = place - inside + inside % 4 * 8 + inside // 16 * 4 + inside // 4 % 4
    if FORMAT == 3:
        inside = place % 8
        place = place - inside + inside % 2 * 4 + inside // 2
    if FORMAT == 5:
        inside = place % 16
        place = place - inside + inside % 4 * 4 + inside // 4
    return place


@triton.jit
def _program(M, N, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """Rows and outputs of this program: bands of BAND row blocks, so that neighbours share weights in the cache."""
    at = tl.program_id(0)
    row_blocks = tl.cdiv(M, BM)
    band_size = BAND * tl.cdiv(N, BN)
    first = at // band_size * BAND
    height = tl.minimum(row_blocks - first, BAND)
    inside = at % band_size
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def _finish(y, m, n, M, N, x_scale, factor, bias, inverse, scale, low, high, shift, first, values, residual,
            MODE: tl.constexpr, DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr, ROUNDING: tl.constexpr,
            ANY_CODES: tl.constexpr, ANY_VALUES: tl.constexpr, SPLIT_AT: tl.constexpr,
            SPLIT_FORMAT: tl.constexpr):  # fmt: skip
    """Scale the sums y (rows m, outputs n), add the bias, and land them as MODE says."""
    live_n = n < N
    scale_factor = tl.load(factor + n, mask=live_n, other=0.0)[None, :]
    y = y * (tl.load(x_scale + m, mask=m < M, other=0.0)[:, None] * scale_factor if DYNAMIC else scale_factor)
    if HAS_BIAS:
        y = y + tl.load(bias + n, mask=live_n, other=0.0)[None, :]
    mask = (m < M)[:, None] & live_n[None, :]
    row = m.to(tl.int64)[:, None]
    column = n[None, :]
    to_grid = live_n[None, :]
    code = y
    if ANY_CODES:
        inverse_ = tl.load(inverse + n, mask=live_n, other=0.0)[None, :]
        low_ = tl.load(low + n, mask=live_n, other=0.0)[None, :]
        high_ = tl.load(high + n, mask=live_n, other=0.0)[None, :]
        to_grid = inverse_ != 0
        code = to_codes(y, inverse_, low_, high_, ROUNDING)
        if MODE == 2 or MODE == 3:  # landed and read again by whoever takes values
            y = tl.where(to_grid, code * tl.load(scale + n, mask=live_n, other=0.0)[None, :], y)
    if MODE == 0:
        if ANY_CODES:
            # a mask that is read from memory makes every store a byte wide
            tl.store(first + row * N + column, code.to(tl.int8), mask=(mask & to_grid) if ANY_VALUES else mask)
        if ANY_VALUES:
            floats = mask & (inverse_ == 0) if ANY_CODES else mask
            tl.store(values + row * N + column, y.to(values.dtype.element_ty), mask=floats)
    if MODE == 1:
        tl.store(residual + row * N + column, y + tl.load(residual + row * N + column, mask=mask, other=0.0), mask=mask)
    if MODE == 2:
        head = mask & (n < SPLIT_AT)[None, :]
        place = row * SPLIT_AT + permuted(column, SPLIT_FORMAT)
        kept = code if first.dtype.element_ty == tl.int8 else y
        tl.store(first + place, kept.to(first.dtype.element_ty), mask=head)
        tl.store(values + row * (N - SPLIT_AT) + column - SPLIT_AT, y.to(values.dtype.element_ty),
                 mask=mask & (n >= SPLIT_AT)[None, :])  # fmt: skip
    if MODE == 3:
        y = softplus(y + tl.load(shift + n, mask=live_n, other=0.0)[None, :])
        tl.store(values + row * N + column, y.to(values.dtype.element_ty), mask=mask)
    if MODE == 4:
        tl.store(values + row * N + column, y.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _scales_of(group_scale, n, N, GROUPS: tl.constexpr, SCALE_ROWS: tl.constexpr):
    """Where the first group's scale of the outputs n lies; the next group's is SCALE_ROWS further."""
    n = tl.minimum(n, (N + SCALE_ROWS - 1) // SCALE_ROWS * SCALE_ROWS - 1)
    return group_scale + n // SCALE_ROWS * (GROUPS * SCALE_ROWS) + n % SCALE_ROWS


@triton.jit
def _whole_kernel(x, x_scale, weight, group_scale, factor, bias, inverse, scale, low, high, shift, first, values,
                  residual, M, N, X_STRIDE: tl.constexpr, K: tl.constexpr, QUAD: tl.constexpr, TR: tl.constexpr,
                  CHUNK: tl.constexpr, SCALE_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, BAND: tl.constexpr, FORMAT: tl.constexpr, GROUPED: tl.constexpr,
                  MODE: tl.constexpr, DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr,
                  ROUNDING: tl.constexpr, ANY_CODES: tl.constexpr, ANY_VALUES: tl.constexpr,
                  SPLIT_AT: tl.constexpr, SPLIT_FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Tiles that the tensor cores take as they are, or after one conversion (int8 to the activations' type)."""
    first_m, first_n = _program(M, N, BM, BN, BAND)
    m, n, k = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK)
    row, tile_row = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, (N + TR - 1) // TR * TR - 1)
    x_at = x + row[:, None] * X_STRIDE + k[None, :]
    start = (tile_row // TR).to(tl.int64) * (K * TR) + tile_row % TR * QUAD
    w_at = weight + start[None, :] + (k // QUAD * (TR * QUAD) + k % QUAD)[:, None]
    scale_at = _scales_of(group_scale, n, N, K // CHUNK, SCALE_ROWS)
    kind: tl.constexpr = tl.int32 if FORMAT == 0 else tl.float32
    total = tl.zeros((BM, BN), tl.float32 if GROUPED else kind)
    for step in range(0, tl.cdiv(K, BK)):
        if K % BK == 0:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            inside = k < K - step * BK
            a, b = tl.load(x_at, mask=inside[None, :], other=0), tl.load(w_at, mask=inside[:, None], other=0)
        sums = tl.zeros((BM, BN), kind) if GROUPED else total
        if FORMAT == 0:  # noqa: SIM108
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        else:
            sums = dot_float(a, b.to(a.dtype), sums, NATIVE)
        if GROUPED:
            total += sums.to(tl.float32) * tl.load(scale_at).to(tl.float32)[None, :]
            scale_at += SCALE_ROWS
        else:
            total = sums
        x_at += BK
        w_at += BK * TR
    _finish(total.to(tl.float32), m, n, M, N, x_scale, factor, bias, inverse, scale, low, high, shift, first, values,
            residual, MODE, DYNAMIC, HAS_BIAS, ROUNDING, ANY_CODES, ANY_VALUES, SPLIT_AT, SPLIT_FORMAT)  # fmt: skip


@triton.jit
def _rows_kernel(x, x_scale, weight, group_scale, factor, bias, inverse, scale, low, high, shift, first, values,
                 residual, M, N, X_STRIDE: tl.constexpr, K: tl.constexpr, QUAD: tl.constexpr, TR: tl.constexpr,
                 CHUNK: tl.constexpr, SCALE_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, BAND: tl.constexpr, FORMAT: tl.constexpr, GROUPED: tl.constexpr,
                 MODE: tl.constexpr, DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr,
                 ROUNDING: tl.constexpr, ANY_CODES: tl.constexpr, ANY_VALUES: tl.constexpr,
                 SPLIT_AT: tl.constexpr, SPLIT_FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """int8 weights by rows. ``x`` and ``weight`` are descriptors: the chip's copy engine needs no registers.

    The weights are the left operand, so that a thread needs two scales a step.
    """
    first_m, first_n = _program(M, N, BM, BN, BAND)
    m, n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    scale_at = _scales_of(group_scale, n, N, K // CHUNK, SCALE_ROWS)
    total = tl.zeros((BN, BM), tl.float32 if GROUPED else tl.int32)
    for start in range(0, K, BK):
        a, b = weight.load([first_n, start]), tl.trans(x.load([first_m, start]))
        if GROUPED:
            sums = tl.dot(a, b, out_dtype=tl.int32)
            total += sums.to(tl.float32) * tl.load(scale_at).to(tl.float32)[:, None]
            scale_at += SCALE_ROWS
        else:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    _finish(tl.trans(total).to(tl.float32), m, n, M, N, x_scale, factor, bias, inverse, scale, low, high, shift, first,
            values, residual, MODE, DYNAMIC, HAS_BIAS, ROUNDING, ANY_CODES, ANY_VALUES, SPLIT_AT,
            SPLIT_FORMAT)  # fmt: skip


@triton.jit
def _unpack(packed, kind, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """The two codes of every byte: times 16 in int8 (the factor knows), or exact in the activations' type."""
    if FORMAT == 6:  # two's complement: as code + 8
        packed = packed ^ -120
    if FORMAT == 1:
        low, high = (packed << 4).to(tl.int8), (packed & -16).to(tl.int8)
    elif NATIVE and kind == tl.bfloat16:  # 0x4300: 128 + nibble, its last place is 1
        low = ((packed.to(tl.int16) & 15) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
        high = ((packed.to(tl.int16) >> 4 & 15) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        low, high = ((packed & 15).to(tl.float32) - 8.0).to(kind), ((packed >> 4 & 15).to(tl.float32) - 8.0).to(kind)
    return low, high


@triton.jit
def _packed_kernel(x, x_scale, weight, group_scale, factor, bias, inverse, scale, low, high, shift, first, values,
                   residual, M, N, X_STRIDE: tl.constexpr, K: tl.constexpr, QUAD: tl.constexpr, TR: tl.constexpr,
                   CHUNK: tl.constexpr, SCALE_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, BAND: tl.constexpr, FORMAT: tl.constexpr, GROUPED: tl.constexpr,
                   MODE: tl.constexpr, DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr,
                   ROUNDING: tl.constexpr, ANY_CODES: tl.constexpr, ANY_VALUES: tl.constexpr,
                   SPLIT_AT: tl.constexpr, SPLIT_FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Two 4-bit codes a byte, unpacked in registers: the weights are the left operand, W x^T.

    CHUNK codes share a scale; their integer sums stay below 2^22.
    """
    first_m, first_n = _program(M, N, BM, BN, BAND)
    m, n, j = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK // 2)
    row, tile_row = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, (N + TR - 1) // TR * TR - 1)
    x_at = x + row[None, :] * X_STRIDE + (j // 16 * 32 + j % 16)[:, None]
    start = (tile_row // TR).to(tl.int64) * (K // 2 * TR) + tile_row % TR * 16
    w_at = weight + start[:, None] + (j // 16 * (TR * 16) + j % 16)[None, :]
    scale_at = _scales_of(group_scale, n, N, K // CHUNK, SCALE_ROWS)
    total = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, K // CHUNK):
        sums = tl.zeros((BN, BM), tl.int32 if FORMAT == 1 else tl.float32)
        for _part in tl.static_range(CHUNK // BK):
            low_codes, high_codes = _unpack(tl.load(w_at), x.dtype.element_ty, FORMAT, NATIVE)
            if FORMAT == 1 and BK < 64:  # too shallow for integer tensor cores: exact in float16 too
                sums += tl.dot(low_codes.to(tl.float16), tl.load(x_at).to(tl.float16)).to(tl.int32)
                sums += tl.dot(high_codes.to(tl.float16), tl.load(x_at + 16).to(tl.float16)).to(tl.int32)
            elif FORMAT == 1:
                sums = tl.dot(low_codes, tl.load(x_at), sums, out_dtype=tl.int32)
                sums = tl.dot(high_codes, tl.load(x_at + 16), sums, out_dtype=tl.int32)
            else:
                sums = dot_float(low_codes, tl.load(x_at), sums, NATIVE)
                sums = dot_float(high_codes, tl.load(x_at + 16), sums, NATIVE)
            x_at += BK
            w_at += BK // 2 * TR
        part = small_to_float(sums) if FORMAT == 1 else sums
        if GROUPED:
            total += part * tl.load(scale_at).to(tl.float32)[:, None]
            scale_at += SCALE_ROWS
        else:
            total += part
    _finish(tl.trans(total), m, n, M, N, x_scale, factor, bias, inverse, scale, low, high, shift, first, values,
            residual, MODE, DYNAMIC, HAS_BIAS, ROUNDING, ANY_CODES, ANY_VALUES, SPLIT_AT, SPLIT_FORMAT)  # fmt: skip


_KERNELS = {format: _packed_kernel if format in PACKED else _whole_kernel for format in Format}


@dataclass(frozen=True)
class Finish:
    """What becomes of a product's outputs.

    LAND: those with a grid go to ``first`` as int8, the others to ``values``. RESIDUAL: added to ``residual``. SPLIT:
    outputs below ``split_at`` go to ``first`` (in the order of ``split_format``), the others, landed and read again,
    to ``values``. SOFTPLUS: landed, read again, softplus(y + ``shift``) to ``values``. PLAIN: to ``values``.
    """

    mode: int
    first: Tensor | None = None
    values: Tensor | None = None
    residual: Tensor | None = None
    shift: Tensor | None = None
    split_at: int = 0
    split_format: int = 0


def _depth(linear: TiledLinear, config: Config) -> tuple[int, int]:
    """Weights of a row that a step takes, and that are summed before a scale is applied."""
    grouped, chunk = linear.group_scale is not None, linear.quads_per_scale * linear.format.quad
    if linear.format in PACKED:
        chunk = chunk if grouped else gcd(linear.columns, 128)  # integer sums stay small
        return gcd(chunk, config.depth), chunk
    return (chunk if grouped else min(config.depth, max(32, triton.next_power_of_2(linear.columns)))), chunk


def choose_outputs(x_scale: Tensor | None, linear: TiledLinear, factor: Tensor, landing: Landing | None,
                   finish: Finish) -> tuple[tuple[Tensor, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of ``_finish`` from x_scale to residual (``factor`` stands for what is not used), and its switches."""
    any_codes = landing is not None and landing.any_codes
    grids: tuple[Tensor | None, ...] = (None,) * 4
    if landing is not None and any_codes:
        grids = (landing.inverse, landing.scale, landing.low, landing.high)
    given = (x_scale, factor, linear.bias, *grids, finish.shift, finish.first, finish.values, finish.residual)
    flags = {
        "MODE": finish.mode, "DYNAMIC": x_scale is not None, "HAS_BIAS": linear.bias is not None,
        "ROUNDING": landing.rounding if landing is not None and any_codes else 0, "ANY_CODES": any_codes,
        "ANY_VALUES": landing is None or landing.values_anywhere, "SPLIT_AT": finish.split_at,
        "SPLIT_FORMAT": finish.split_format,
    }  # fmt: skip
    return tuple(factor if part is None else part for part in given), flags


def gemm(x: Tensor, x_scale: Tensor | None, linear: TiledLinear, factor: Tensor, landing: Landing | None,
         finish: Finish, config: Config | None = None) -> None:  # fmt: skip
    """y = x W^T, each row times ``factor`` (and ``x_scale`` (M,) if dynamic), plus bias, then as ``finish`` says.

    ``x``: int8, bfloat16 or float32 (M, K), its columns in the order of ``permuted``. ``landing``: the grids of the
    outputs (``gpu.gemv.Landing``), or None.
    """
    config = config or choose_config(linear, x.shape[0])
    depth, chunk = _depth(linear, config)
    (scale, *pointers), flags = choose_outputs(x_scale, linear, factor, landing, finish)
    kinds = {Format.BFLOAT16_FLOAT: torch.bfloat16, Format.FLOAT32_FLOAT: torch.float32}
    words = linear.words.view(kinds.get(linear.format, torch.int8))
    kernel, operands = _KERNELS[linear.format], (x, words)
    if by_rows(linear):
        rows = words.view(linear.rows, linear.columns)
        kernel = _rows_kernel
        operands = (TensorDescriptor.from_tensor(x, [config.rows, depth]),
                    TensorDescriptor.from_tensor(rows, [config.outputs, depth]))  # fmt: skip
    group_scale = factor if linear.group_scale is None else linear.group_scale
    kernel[(triton.cdiv(len(x), config.rows) * triton.cdiv(linear.rows, config.outputs),)](
        operands[0], scale, operands[1], group_scale, *pointers, len(x), linear.rows, X_STRIDE=x.stride(0),
        K=linear.columns, QUAD=linear.format.quad, TR=linear.tile_rows, CHUNK=chunk,
        SCALE_ROWS=1 if linear.group_scale is None else group_scale.shape[2], BM=config.rows, BN=config.outputs,
        BK=depth, BAND=8, FORMAT=int(linear.format), GROUPED=linear.group_scale is not None, NATIVE=not INTERPRETED,
        num_warps=config.warps, num_stages=config.stages, **flags,
    )  # fmt: skip
