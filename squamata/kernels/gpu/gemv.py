# mypy: allow-untyped-defs
"""Matrix-vector products for a few rows: packed weights streamed once, results landed on the sites of their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.dot import Cut, product_tile
from squamata.kernels.gpu.math import count_program, dot4
from squamata.kernels.gpu.stream import Sink
from squamata.kernels.gpu.tiles import Format, TiledLinear

INTERPRETED = not isinstance(dot4, triton.runtime.JITFunction)
# Quads that a thread asks for before it uses the first, four registers each. 4-bit weights: fewer, so that more
# programs fit on a multiprocessor; 8-bit weights: fewer only where one wave of programs is enough (measured, one H200).
MOST_QUADS = 20
MOST_QUADS_OF = {Format.INT4_INT8: 10, Format.INT4_INT16: 8}
FEW_PROGRAMS, FEW_QUADS_OF = 400, {Format.INT8_INT8: 10}
MOST_REGISTERS = {Format.INT4_INT16: 80}  # of a thread, so that more programs fit (a quarter less time at 8B)
FEW_ROWS = 8  # up to which the activations of every row are applied to a weight while it is in registers


@dataclass(frozen=True)
class Landing:
    """Where the rows of a product go. All float32 (padded rows,): ``inverse`` 0 means that the row stays float;
    ``scale`` is for those who read a landed row as values.

    Rows ``ring_start`` to ``ring_stop`` go into the convolution's ring.
    """

    inverse: Tensor
    low: Tensor
    high: Tensor
    rounding: int = 0
    ring_start: int = 0
    ring_stop: int = 0
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

    def part(self, start: int, stop: int) -> Landing:
        """Of rows ``start`` to ``stop``, which hold the ring as a whole or nothing of it."""
        inverse, low, high = (table[start:stop] for table in (self.inverse, self.low, self.high))
        ring = (
            slice(self.ring_start - start, self.ring_stop - start) if start <= self.ring_start < stop else slice(0, 0)
        )
        outside = torch.cat([inverse[: ring.start], inverse[ring.stop :]])
        return replace(
            self,
            inverse=inverse,
            low=low,
            high=high,
            ring_start=ring.start,
            ring_stop=ring.stop,
            any_codes=bool((inverse != 0).any()),
            any_values=bool((outside == 0).any()),
            scale=None if self.scale is None else self.scale[start:stop],
        )


@dataclass(frozen=True)
class Count:
    """Programs of a product that others wait for, counted from the first token on, never set back.

    ``counter``: int64 (1,), alone in its 128 bytes. ``steps``: int64 (1,), tokens before this one. ``programs``: what a
    token adds.
    """

    counter: Tensor
    steps: Tensor
    programs: int

    @property
    def operands(self) -> tuple[Any, ...]:
        """As the kernels take it."""
        return self.counter, self.steps, self.programs


@dataclass(frozen=True)
class Blocks:
    """How the input of a product was left by programs with a block of ``channels`` each: out_proj's by the scan, where
    nothing rotates it; in_proj's by out_proj (``gpu.stream``).

    ``gate`` (B, E): multiplied with by the scan (None: has been). ``gain`` (E,): of the norm in ``groups`` that follows
    (None: no norm); the scan multiplies with it and leaves the sums of squares before, ``squares`` (B, blocks), and the
    product applies the norm, which is one number a group. ``scale`` (B, blocks): of codes in 16 bits, one a block, as
    ``gpu.norm`` lands them (None: they are float). All float32.
    """

    channels: int
    gate: Tensor | None = None
    gain: Tensor | None = None
    groups: int = 1
    epsilon: float = 0.0
    squares: Tensor | None = None
    scale: Tensor | None = None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """As the scan's kernels take it."""
        return self.gate, self.gain, self.squares, self.scale


@triton.jit
def _gemv(operands, position, CUT: tl.constexpr, PDL: tl.constexpr):
    product_tile(operands, position, tl.program_id(0), tl.program_id(1) * CUT.rows, CUT, PDL)


@triton.jit
def _gemv_pair(first, second, position, counter, TILES: tl.constexpr, CUT: tl.constexpr, OTHER_CUT: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """Two products that wait for the same kernel; the first counts its programs, for those who need it alone."""
    program = tl.program_id(0)
    block = tl.program_id(1)
    if program < TILES:
        product_tile(first, position, program, block * CUT.rows, CUT, PDL)
        count_program(counter)
    else:
        product_tile(second, position, program - TILES, block * CUT.rows, OTHER_CUT, PDL)


@dataclass(frozen=True)
class Product:
    """A product ready to be launched, by itself or as some programs of another kernel."""

    operands: tuple[Any, ...]
    cut: Cut
    tiles: int
    row_blocks: int

    @property
    def programs(self) -> int:
        """Programs that it takes."""
        return self.tiles * self.row_blocks

    @property
    def registers(self) -> int | None:
        """A thread may have; None: what the compiler gives."""
        return MOST_REGISTERS.get(Format(self.cut.format))

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return max(1, self.cut.slices * self.cut.tile_rows // 32)


@dataclass(frozen=True)
class Shape:
    """How a product is cut: ``tile_rows`` rows a program, ``slices`` of K side by side; at most ``quads`` of each asked
    for at once (0: as its format has it)."""

    tile_rows: int
    slices: int
    quads: int = 0


def choose_shape(
    rows: int, columns: int, format: Format, apart: int = 0, least: int = 8, together: bool = False
) -> Shape:
    """The cut for a weight (rows, columns); its first rows ``apart`` are a product of their own, launched ``together``
    with the others or not; tiles of at least ``least`` rows.

    A rule that comes within a tenth of the best cut of every shape measured (H200, docs/log.md): 256 threads a program
    where K allows it, three quads a thread at least, some 200 programs at least.
    """
    quads = columns // format.quad
    one_round = together and format == Format.BFLOAT16_FLOAT and quads // 16 <= MOST_QUADS
    tall = format.integer_activations or format == Format.INT4_INT16 or one_round
    rows = max(rows - apart, apart)
    tile_rows = next((size for size in (32, 16) if tall and rows // size >= (256 if size == 32 else 200)), least)
    tile_rows = gcd(tile_rows, apart)
    slices = 1
    while quads % (2 * slices) == 0 and quads // (2 * slices) >= 3 and slices * tile_rows < 256:
        slices *= 2
    while slices * tile_rows < 32 and quads % (2 * slices) == 0:
        slices *= 2
    wide = format == Format.BFLOAT16_FLOAT and quads // slices >= MOST_QUADS and not one_round
    if wide and 200 <= rows // tile_rows <= FEW_PROGRAMS:
        slices //= 2  # twice the programs on a multiprocessor: one wave, in two rounds
    few = FEW_QUADS_OF.get(format, 0) if together else 0
    return Shape(tile_rows, slices, few // 2 if quads == few * slices else 0)  # two rounds, half the registers: 5 %


@dataclass(frozen=True)
class Convolution:
    """Where the convolution's rows of a product go: ``ring`` (K, B, C), and through it to ``out`` (B, C)."""

    plan: ConvolutionPlan
    ring: Tensor
    out: Tensor

    @property
    def operands(self) -> tuple[Any, ...]:
        """As the kernel takes it."""
        return self.ring, self.plan.tables, self.out


def _ring_cut(land: Landing, convolution: Convolution | None) -> dict[str, Any]:
    """Of ``Cut``: the convolution."""
    none = {"ring_start": 0, "ring_stop": 0, "width": 1, "split": 0, "conv_rounding": -1, "conv_rounding_bc": -1}
    if convolution is None:
        return none | {"conv_codes": False}
    plan = convolution.plan
    return {
        "ring_start": land.ring_start,
        "ring_stop": land.ring_stop,
        "width": convolution.ring.shape[0],
        "split": plan.split,
        "conv_rounding": plan.rounding,
        "conv_rounding_bc": plan.rounding_bc,
        "conv_codes": convolution.out.dtype == torch.int8,
    }


def _norm_cut(columns: int, blocks: Blocks | None) -> dict[str, Any]:
    """Of ``Cut``: the norm that is still to be applied."""
    if blocks is None or blocks.squares is None:
        return {"norm_groups": 0, "norm_parts": 0, "norm_padded": 0, "norm_width": 0}
    width = columns // blocks.groups
    parts = width // blocks.channels
    padded = triton.next_power_of_2(parts)
    return {"norm_groups": blocks.groups, "norm_parts": parts, "norm_padded": padded, "norm_width": width}


def product(
    x: Tensor,
    x_scale: Tensor | None,
    linear: TiledLinear,
    factor: Tensor,
    landing: Landing | None,
    out: tuple[Tensor | None, Tensor | None],
    convolution: Convolution | None,
    shape: Shape,
    gate: bool = False,
    blocks: Blocks | None = None,
    sink: Sink | None = None,
) -> Product:
    """y = W x, each row times ``factor`` (and ``x_scale`` (rows,) if dynamic), plus bias, landed; ``gate``: its SiLU.
    ``blocks``: how x was left, with scales instead of ``x_scale``; ``sink``: where rows go instead of ``out``.

    ``x``: int8 or float32 (rows, K), rows 4-byte aligned; two int8 rows of K side by side for INT4_INT16. ``out``:
    codes int8 and values float32 (rows, N), one of them may be None.
    """
    rows = x.shape[0]
    quads_per_slice = linear.quads // shape.slices
    most = MOST_QUADS_OF.get(linear.format, MOST_QUADS)
    if linear.words.shape[0] <= FEW_PROGRAMS:
        most = FEW_QUADS_OF.get(linear.format, most)
    most = shape.quads or most
    count = max(size for size in range(1, most + 1) if quads_per_slice % size == 0)
    grouped = linear.group_scale is not None
    halves = linear.format == Format.INT4_INT16
    same = gcd(linear.quads_per_scale, count, 8) if grouped or halves else count  # 8: integer sums stay below 2^22
    integer = linear.format.integer_activations or halves
    block = blocks.channels if blocks is not None and blocks.scale is not None else 0
    if block >= linear.format.quad:
        same = gcd(same, block // linear.format.quad)
    if block:
        x_scale = None
    per_program = 1 if rows == 1 else min(FEW_ROWS, triton.next_power_of_2(rows))
    land = landing if landing is not None else Landing(factor, factor, factor, any_codes=False)
    codes, values = (part if part is not None else next(other for other in out if other is not None) for part in out)
    cut = Cut(
        format=int(linear.format), tile_rows=linear.tile_rows, slices=shape.slices, count=count,
        rounds=quads_per_slice // count, same=same, quads=linear.quads, quads_per_scale=linear.quads_per_scale,
        block=block, **_norm_cut(linear.columns, blocks), rows=per_program,
        x_stride=x.stride(0) // 4 if integer else x.stride(0),
        x_length=linear.columns // 4 if integer else linear.columns,
        x_quad=linear.format.quad // (4 if integer else 1), grouped=grouped, dynamic=x_scale is not None,
        has_bias=linear.bias is not None, rounding=land.rounding, any_codes=land.any_codes,
        any_values=land.any_values, ring_codes=land.ring_codes, gate=gate, stream=0 if sink is None else linear.rows,
        stream_halves=sink is not None and sink.halves,
        native=not INTERPRETED,
        **_ring_cut(land, convolution),
    )  # fmt: skip
    scale = blocks.scale if blocks is not None and block else x_scale
    squares = factor if blocks is None or blocks.squares is None else blocks.squares
    operands = (
        x.view(torch.int32) if integer else x, factor if scale is None else scale, linear.words,
        linear.group_scale if grouped else factor, factor, linear.bias if linear.bias is not None else factor,
        (land.inverse, land.low, land.high, land.scale if land.scale is not None else factor), (codes, values),
        (values, values, values) if convolution is None else convolution.operands,
        (squares, 0.0 if blocks is None else blocks.epsilon), linear.rows, rows,
        (factor,) if sink is None else sink.operands,
    )  # fmt: skip
    return Product(operands, cut, int(linear.words.shape[0]), triton.cdiv(rows, per_program))


def gemv(made: Product, position: Tensor, pdl: bool) -> None:
    """Launch a product by itself. ``position``: int32 (1,), which slot of the ring its rows go into."""
    _gemv[(made.tiles, made.row_blocks)](
        made.operands, position, CUT=made.cut, PDL=pdl, num_warps=made.warps, maxnreg=made.registers,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def gemv_pair(first: Product, second: Product, position: Tensor, pdl: bool, counter: Tensor | None = None) -> None:
    """Launch two products for the same rows at once, neither of which waits for the other.

    ``counter``: int64 (1,), raised by ``first.programs``, for the next kernel (``Count``).
    """
    _gemv_pair[(first.tiles + second.tiles, first.row_blocks)](
        first.operands, second.operands, position, counter, TILES=first.tiles, CUT=first.cut, OTHER_CUT=second.cut,
        PDL=pdl, num_warps=max(first.warps, second.warps), maxnreg=first.registers,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
