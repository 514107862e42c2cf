# mypy: allow-untyped-defs
"""Weights laid out row by row for products of many rows, and cuBLAS with a fused finish for the floating ones.

The tiles that a matrix-vector product streams cost a large product half its speed: laying a weight out first, in
scratch memory, pays from some 128 rows on (docs/log.md). Integer products then are Triton's (1.5 times
``torch._int_mm``), floating ones cuBLAS's: 4-bit weights times their group's scale become bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.gemm import PACKED, Finish, _finish, choose_outputs
from squamata.kernels.gpu.gemv import Landing
from squamata.kernels.gpu.math import nibble_to_float
from squamata.kernels.gpu.tiles import Format, TiledLinear

OPERAND = {
    Format.INT8_INT8: torch.int8,
    Format.INT4_INT8: torch.int8,
    Format.INT4_FLOAT: torch.bfloat16,
    Format.INT4_INT16: torch.bfloat16,
    Format.BFLOAT16_FLOAT: torch.bfloat16,
    Format.INT8_FLOAT: torch.bfloat16,
}
FINISH_ROWS, FINISH_OUTPUTS, FINISH_WARPS = 16, 256, 4
EXPAND_BYTES = 256  # of a row that a program takes


@triton.jit
def _expand_kernel(words, group_scale, out, N, TR: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK: tl.constexpr,
                   GROUP_BYTES: tl.constexpr, PACKED: tl.constexpr, FORMAT: tl.constexpr,
                   GROUPED: tl.constexpr):  # fmt: skip
    """BLOCK bytes of each row of a tile of TR rows."""
    tile = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, TR)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (at < ROW_BYTES) & (tile * TR + r < N)
    byte = tl.load(words + tile * (TR * ROW_BYTES) + at // 16 * (TR * 16) + r * 16 + at % 16, mask=inside, other=0)
    row = out + (tile * TR + r) * (ROW_BYTES * 2 if PACKED else ROW_BYTES)
    if PACKED:
        scale = 1.0
        if GROUPED and FORMAT != 1:
            groups: tl.constexpr = ROW_BYTES // GROUP_BYTES
            scale = tl.load(group_scale + (tile * groups + at // GROUP_BYTES) * TR + r, mask=inside, other=0.0)
            scale = scale.to(tl.float32)
        place = at // 16 * 32 + at % 16
        if FORMAT == 1:  # times 16, which the factor knows; the scale waits for the sums
            tl.store(row + place, byte << 4, mask=inside)
            tl.store(row + place + 16, byte & -16, mask=inside)
        else:
            unsigned = byte.to(tl.int32) ^ (0x88 if FORMAT == 6 else 0)
            low, high = nibble_to_float(unsigned, 0), nibble_to_float(unsigned, 1)
            tl.store(row + place, (low * scale).to(out.dtype.element_ty), mask=inside)
            tl.store(row + place + 16, (high * scale).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(row + at, byte.to(out.dtype.element_ty), mask=inside)


def in_rows(linear: TiledLinear) -> bool:
    """True if the tiles are rows already, in the type that the library multiplies."""
    return linear.tile_rows == 1 and linear.format in (Format.INT8_INT8, Format.BFLOAT16_FLOAT)


def rows_of(linear: TiledLinear, scratch: Tensor) -> Tensor:
    """The weight (N, K) in the type and the column order in which activations meet it: a view.

    Of the tiles where they are rows already, else of ``scratch`` (bytes), where ``expand`` writes it.
    """
    operand, size = OPERAND[linear.format], linear.rows * linear.columns
    source = linear.words if in_rows(linear) else scratch[: size * operand.itemsize]
    return source.view(operand).reshape(-1)[:size].view(linear.rows, linear.columns)


def expand(linear: TiledLinear, out: Tensor) -> None:
    """Write the weight into ``out`` (``rows_of``)."""
    packed, wide = linear.format in PACKED, linear.format == Format.BFLOAT16_FLOAT
    row_bytes = linear.columns // 2 if packed else linear.columns * (2 if wide else 1)
    grouped = linear.group_scale is not None
    _expand_kernel[(linear.words.shape[0], triton.cdiv(row_bytes, EXPAND_BYTES))](
        linear.words.view(torch.int8), linear.group_scale if grouped else linear.factor,
        out.view(torch.int8) if wide else out, linear.rows, TR=linear.tile_rows, ROW_BYTES=row_bytes,
        BLOCK=EXPAND_BYTES, GROUP_BYTES=linear.quads_per_scale * 16, PACKED=packed, FORMAT=int(linear.format),
        GROUPED=grouped, num_warps=4,
    )  # fmt: skip


def as_rows(linear: TiledLinear, weight: Tensor) -> TiledLinear:
    """The same linear over a weight laid out by rows, for the integer products of ``gpu.gemm``."""
    quads = linear.columns // Format.INT8_INT8.quad
    words = weight.view(torch.int32).view(linear.rows, quads, 1, 4)
    return replace(linear, format=Format.INT8_INT8, tile_rows=1, words=words)


def scratch_bytes(linear: TiledLinear) -> int:
    """What ``row_major`` may need."""
    return linear.rows * linear.columns * OPERAND[linear.format].itemsize if linear.format in OPERAND else 0


def multiply(x: Tensor, weight: Tensor, sums: Tensor) -> None:
    """sums float32 (M, N) = x (M, K) weight (N, K)^T."""
    if x.is_cuda:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=sums)
    else:
        torch.mm(x.float(), weight.float().T, out=sums)


@triton.jit
def _finish_kernel(sums, x_scale, factor, bias, inverse, scale, low, high, shift, first, values, residual, M, N,
                   BM: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, DYNAMIC: tl.constexpr,
                   HAS_BIAS: tl.constexpr, ROUNDING: tl.constexpr, ANY_CODES: tl.constexpr, ANY_VALUES: tl.constexpr,
                   SPLIT_AT: tl.constexpr, SPLIT_FORMAT: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < M)[:, None] & (n < N)[None, :]
    y = tl.load(sums + m.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0).to(tl.float32)
    _finish(y, m, n, M, N, x_scale, factor, bias, inverse, scale, low, high, shift, first, values, residual, MODE,
            DYNAMIC, HAS_BIAS, ROUNDING, ANY_CODES, ANY_VALUES, SPLIT_AT, SPLIT_FORMAT)  # fmt: skip


def finish_sums(sums: Tensor, x_scale: Tensor | None, linear: TiledLinear, factor: Tensor, landing: Landing | None,
                finish: Finish) -> None:  # fmt: skip
    """What ``gpu.gemm.gemm`` does with its sums."""
    rows, outputs = sums.shape
    pointers, flags = choose_outputs(x_scale, linear, factor, landing, finish)
    grid = (triton.cdiv(outputs, FINISH_OUTPUTS), triton.cdiv(rows, FINISH_ROWS))
    _finish_kernel[grid](
        sums, *pointers, rows, outputs, BM=FINISH_ROWS, BN=FINISH_OUTPUTS, num_warps=FINISH_WARPS, **flags
    )
