"""Weights as the GPU's matrix-vector kernel streams them: lane = row, 16 bytes of a row at a time.

A tile is ``tile_rows`` neighbouring rows. A *quad* is four 32-bit words of one row: 16 int8, 32 int4, 8 bfloat16 or
4 float32 weights. Memory order is tile, quad, row, word: the lanes of a warp read neighbouring rows, every access is
16 bytes a lane and coalesced, and a lane keeps a row's partial sums to itself, so that a dot product needs no
exchange between lanes before its end. Which k a bit of a quad holds depends on the format (``_ORDERS``): the
activations that meet it must be neighbours too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import QTensor


class Format(IntEnum):
    """Weights x activations of a matrix-vector product."""

    INT8_INT8 = 0
    INT4_INT8 = 1
    INT4_FLOAT = 2
    BFLOAT16_FLOAT = 3
    FLOAT32_FLOAT = 4
    INT8_FLOAT = 5
    INT4_INT16 = 6

    @property
    def quad(self) -> int:
        """Weights of a row in 16 bytes."""
        four_bit = {Format.INT4_INT8: 32, Format.INT4_FLOAT: 32, Format.INT4_INT16: 32}
        return (four_bit | {Format.BFLOAT16_FLOAT: 8, Format.FLOAT32_FLOAT: 4}).get(self, 16)

    @property
    def integer_activations(self) -> bool:
        """True if int8 activations meet the weight, in products of any number of rows.

        The 16 bits of INT4_INT16 are how a product of few rows takes activations that are float elsewhere.
        """
        return self in (Format.INT8_INT8, Format.INT4_INT8)


@dataclass(frozen=True)
class TiledLinear:
    """A weight matrix (rows N, columns K) in tiles.

    ``words``: int32 (T, quads, tile_rows, 4). ``group_scale``: float16 or float32 (T, groups, tile_rows), or None.
    ``factor``: float32 (T tile_rows,), what a row's sum is multiplied with (scale of the activations left out).
    ``bias``: float32 (T tile_rows,) or None. Rows past N are zero.
    """

    format: Format
    rows: int
    columns: int
    tile_rows: int
    words: Tensor
    factor: Tensor
    group_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def quads(self) -> int:
        return int(self.words.shape[1])

    @property
    def quads_per_scale(self) -> int:
        """Quads that share one scale of a row: all of them if there are no groups."""
        return self.quads if self.group_scale is None else self.quads // self.group_scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one product streams."""
        parts = (self.words, self.factor, self.group_scale, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def part(self, start: int, stop: int) -> TiledLinear:
        """Rows ``start`` to ``stop``, in the same memory; tiles are not cut, so ``start`` begins one."""
        tiles = slice(start // self.tile_rows, -(-stop // self.tile_rows))
        rows = slice(tiles.start * self.tile_rows, tiles.stop * self.tile_rows)
        return replace(
            self,
            rows=stop - start,
            words=self.words[tiles],
            factor=self.factor[rows],
            group_scale=None if self.group_scale is None else self.group_scale[tiles],
            bias=None if self.bias is None else self.bias[rows],
        )


def weight_format(layer: Linear, integer_activations: bool, bfloat16: bool, halves: bool = False) -> Format:
    """How this layer's weight is streamed. SquamataError for one the GPU kernels do not take.

    ``halves``: whoever writes the activations can leave them in 16 bits, as two of int8.
    """
    weight = layer.weight
    if not isinstance(weight, QTensor):
        return Format.BFLOAT16_FLOAT if bfloat16 else Format.FLOAT32_FLOAT
    if weight.second is not None or weight.spec.bits not in (4, 8) or not weight.spec.linear_grid:
        raise SquamataError(f"the GPU kernels take symmetric 8- and 4-bit weights, not {weight.spec.describe()}")
    if weight.spec.bits == 4:
        floating = Format.INT4_INT16 if halves else Format.INT4_FLOAT
        return Format.INT4_INT8 if integer_activations else floating
    return Format.INT8_INT8 if integer_activations else Format.INT8_FLOAT


def tile_linear(layer: Linear, format: Format, tile_rows: int, device: torch.device | str) -> TiledLinear:
    """Repack a layer's weight. SquamataError if its width or group size does not fit the format."""
    weight = layer.weight
    columns = int(weight.shape[1])
    values = weight.codes() if isinstance(weight, QTensor) else weight
    values = _pad_rows(values.to(device), tile_rows)
    if format in (Format.BFLOAT16_FLOAT, Format.FLOAT32_FLOAT):
        values = values.to(torch.bfloat16 if format == Format.BFLOAT16_FLOAT else torch.float32)
    if columns % format.quad:
        raise SquamataError(f"the GPU kernels take widths that are multiples of {format.quad}, not {columns}")
    words = _ORDERS[format](values.unflatten(1, (-1, format.quad)))
    words = words.unflatten(0, (-1, tile_rows)).transpose(1, 2).contiguous().view(torch.int32)
    factor, group_scale = torch.ones(len(values), device=device), None
    if isinstance(weight, QTensor):
        group = weight.spec.granularity.group
        if group is None:
            factor = _pad_rows(weight.scale.to(device).float().reshape(-1).expand(weight.shape[0]), tile_rows)
        else:
            group_scale = _group_scale(weight.scale.to(device).float(), group, columns, format, tile_rows)
    if format == Format.INT4_INT8:
        factor = factor / 16  # the kernel multiplies codes that sit in the upper half of a byte
    bias = None if layer.bias is None else _pad_rows(layer.bias.to(device).float(), tile_rows).contiguous()
    rows = int(weight.shape[0])
    return TiledLinear(format, rows, columns, tile_rows, words, factor.contiguous(), group_scale, bias)


def _group_scale(scale: Tensor, group: int, columns: int, format: Format, tile_rows: int) -> Tensor:
    """(N, groups) -> (T, groups, tile_rows), in float16 if that loses nothing."""
    if group % format.quad or columns % group:
        raise SquamataError(f"the GPU kernels take weight groups of multiples of {format.quad} that divide {columns}")
    tiled = _pad_rows(scale, tile_rows).unflatten(0, (-1, tile_rows)).transpose(1, 2).contiguous()
    half = tiled.half()
    return half if torch.equal(half.float(), tiled) else tiled


def _pad_rows(matrix: Tensor, multiple: int) -> Tensor:
    missing = -len(matrix) % multiple
    return torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])]) if missing else matrix


def _bytes(values: Tensor) -> Tensor:
    """(N, quads, ...) -> the same memory as uint8 (N, quads, 16)."""
    return values.contiguous().flatten(2).view(torch.uint8)


def _int4_for_int8(codes: Tensor) -> Tensor:
    """Byte b: code b in the low half, code 16 + b in the upper half, two's complement."""
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[..., :16] | (nibbles[..., 16:] << 4)


def _int4_for_float(codes: Tensor) -> Tensor:
    """Nibble p of word w: code 4 p + w, stored as code + 8."""
    nibbles = (codes + 8).view(torch.uint8).unflatten(-1, (4, 2, 4))  # (N, quads, byte, half, word)
    packed = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    return _bytes(packed.transpose(-1, -2))


def _strided(per_word: int) -> Callable[[Tensor], Tensor]:
    """Part j of word w: value 4 j + w."""
    return lambda values: _bytes(values.unflatten(-1, (per_word, 4)).transpose(-1, -2))


_ORDERS: dict[Format, Callable[[Tensor], Tensor]] = {
    Format.INT8_INT8: _bytes,
    Format.INT4_INT8: _int4_for_int8,
    Format.INT4_FLOAT: _int4_for_float,
    Format.BFLOAT16_FLOAT: _strided(2),
    Format.FLOAT32_FLOAT: _bytes,
    Format.INT8_FLOAT: _strided(4),
    Format.INT4_INT16: _int4_for_int8,
}
