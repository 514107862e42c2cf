"""Tiles of the GPU's products of many rows: the committed choice for a weight and a number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from squamata.kernels.gpu.tiles import Format, TiledLinear

PACKED = (Format.INT4_INT8, Format.INT4_FLOAT, Format.INT4_INT16)


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
_ROWS_FEW = [(32, Config(32, 64, 256, 4, 4)), (128, Config(64, 64, 128, 4, 4))]
_ROWS_MANY = (2**31, Config(128, 128, 128, 4, 3))
_ROWS = [*_ROWS_FEW, (256, Config(64, 128, 128, 4, 3)), _ROWS_MANY]
# The same for products such as in_proj, out_proj and Mamba-1's dt_proj of 2.7B
_ROWS_WIDE = [*_ROWS_FEW, (192, Config(64, 128, 128, 4, 3)), (256, Config(128, 64, 128, 4, 3)), _ROWS_MANY]
_ROWS_DEEP = [*_ROWS_FEW, (256, Config(64, 64, 256, 4, 3)), (1024, Config(64, 128, 128, 4, 3)), _ROWS_MANY]
_ROWS_SHALLOW = [(512, Config(64, 64, 128, 4, 2)), (2**31, Config(128, 128, 64, 4, 3))]
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
    shallow = linear.columns < 512 and rows > 64
    if by_rows(linear):
        return _filling(_ROWS_SHALLOW if shallow else _table_of_rows(linear), linear.rows, rows)
    if linear.format == Format.INT8_INT8 and shallow:
        return _SHALLOW
    found = _filling(CONFIGS[linear.format], linear.rows, rows)
    narrow = triton.cdiv(rows, found.rows) * triton.cdiv(linear.rows, found.outputs) < _PROGRAMS // 2
    return _NARROW if narrow and linear.format == Format.INT8_INT8 and rows > 64 else found


def _table_of_rows(linear: TiledLinear) -> list[tuple[int, Config]]:
    """By outputs and columns of a weight by rows."""
    if linear.group_scale is not None:
        return _ROWS_GROUPED
    if linear.rows >= 8192:
        return _ROWS_WIDE
    return _ROWS_DEEP if 2048 <= linear.rows < 4096 and linear.columns >= 2 * linear.rows else _ROWS


def _filling(table: list[tuple[int, Config]], outputs: int, rows: int) -> Config:
    """The table's configuration for so many rows, or an earlier one where that leaves too few programs."""
    at = next(index for index, (limit, _) in enumerate(table) if rows <= limit)
    while at > 0 and triton.cdiv(rows, table[at][1].rows) * triton.cdiv(outputs, table[at][1].outputs) < _PROGRAMS:
        at -= 1
    return table[at][1]
