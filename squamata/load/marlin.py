"""Weights of the Marlin kernels (Frantar et al. 2024) and of QQQ (Zhang et al. 2024): 4-bit tiles back into a matrix.

Both cut a weight (K, N), input x output, into tiles of 16 x 64 and store a tile's 1024 codes, each plus 8, in the order
in which 32 threads of a tensor core read them, eight to an int32. The two differ in the rows that a thread holds: two
and two for 16-bit products (Marlin), four neighbours for 8-bit ones (QQQ).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["marlin", "qqq"]

_TILE = 16
_NIBBLES = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # code that the i-th nibble of an int32 holds
_TILE_ROWS_AT_A_TIME = 64


def tile_order(kernel: Kernel) -> Tensor:
    """int64 (1024,): place in four 16 x 16 tiles, one after the other and row-major, of every code of the file."""
    thread, tile, half, held = torch.meshgrid(*(torch.arange(size) for size in (32, 4, 2, 4)), indexing="ij")
    quad = thread % 4
    row = 4 * quad + held if kernel == "qqq" else 2 * quad + held % 2 + 8 * (held // 2)
    order = _TILE * row + thread // 4 + 8 * half + 256 * tile
    return order.reshape(-1, 8)[:, _NIBBLES].reshape(-1)


def unpack_weight(packed: Tensor, rows: int, kernel: Kernel) -> Tensor:
    """int32 (K / 16, 2 N) -> int8 codes -8..7 (rows, K); outputs beyond ``rows`` are padding."""
    tile_rows, width = packed.shape[0], packed.shape[1] // 2
    order = tile_order(kernel)
    codes = torch.empty(rows, _TILE * tile_rows, dtype=torch.int8)
    for start in range(0, tile_rows, _TILE_ROWS_AT_A_TIME):
        part = nibbles(packed[start : start + _TILE_ROWS_AT_A_TIME]).reshape(-1, order.numel())
        tiles = torch.empty_like(part)
        tiles[:, order] = part
        matrix = tiles.reshape(-1, width // _TILE, _TILE, _TILE).transpose(1, 2).reshape(-1, width)
        codes[:, _TILE * start : _TILE * start + len(matrix)] = matrix.T[:rows].view(torch.int8) - 8
    return codes


def nibbles(packed: Tensor) -> Tensor:
    """int32 (..., n) -> uint8 (..., 8 n), the lowest four bits of each first."""
    data = packed.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def unpack_embedding(packed: Tensor) -> Tensor:
    """int32 (V, D / 8) of a row-major table, codes plus 8 -> int8 codes -8..7 (V, D)."""
    stored = nibbles(packed).unflatten(-1, (-1, 8))
    codes = torch.empty_like(stored)
    codes[..., _NIBBLES] = stored
    return codes.flatten(-2).view(torch.int8) - 8


def unpermute_scales(scale: Tensor, per_group: bool) -> Tensor:
    """Scales (..., N) of the file in the order of the outputs: those of groups, or those of whole channels."""
    if per_group:
        order = torch.arange(64).reshape(8, 8).T.reshape(-1)
    else:
        order = (2 * torch.arange(4)[:, None] + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])).reshape(-1)
    stored = scale.reshape(-1, order.numel())
    plain = torch.empty_like(stored)
    plain[:, order] = stored
    return plain.reshape(scale.shape)
