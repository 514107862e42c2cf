"""The stages of a decoded token on a GPU: products with what comes before and after them, static memory between.

``triton.py`` puts them together to layers and says why their order is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from squamata.kernels.gpu.gemv import Blocks, Convolution, Count, Landing, Product, Shape, gemv, product
from squamata.kernels.gpu.landing import RowSite
from squamata.kernels.gpu.norm import RotationPlan, norm, rotate
from squamata.kernels.gpu.rows import RowRotation
from squamata.kernels.gpu.scan import InputPlan, StatePlan
from squamata.kernels.gpu.stream import Sink
from squamata.kernels.gpu.tiles import Format, TiledLinear

Kernel = tuple[str, Callable[[], None]]  # name, launch


@dataclass(frozen=True)
class Projection:
    """A product with everything but its activations. ``site``: what its input lands on before."""

    linear: TiledLinear
    factor: Tensor
    landing: Landing | None
    site: RowSite
    shape: Shape

    @property
    def halves(self) -> bool:
        """True if it takes its input in 16 bits, as two rows of int8 with a scale of their own."""
        return self.linear.format == Format.INT4_INT16

    def input(self, name: str, buffers: Buffers) -> Tensor:
        """Memory for what it reads."""
        columns = self.linear.columns * (2 if self.halves else 1)
        return buffers.get(name, columns, self.site.quantized or self.halves)

    def part(self, start: int, stop: int) -> Projection:
        """Its rows ``start`` to ``stop``, in the same memory; ``start`` begins a tile."""
        assert self.landing is not None
        linear = self.linear.part(start, stop)
        factor = self.factor[start : start + len(linear.factor)]
        return replace(self, linear=linear, factor=factor, landing=self.landing.part(start, stop))

    def product(
        self,
        x: Tensor,
        out: Outputs | Sink,
        buffers: Buffers,
        convolution: Convolution | None = None,
        gate: bool = False,
        blocks: Blocks | None = None,
    ) -> Product:
        """The product for these rows, to be launched. ``blocks``: how ``x`` was left."""
        scale = buffers.row_scale if self.site.span > 0 or self.halves else None
        sink = out if isinstance(out, Sink) else None
        outputs = (None, out.stream) if isinstance(out, Sink) else (out.codes, out.values)
        return product(
            x, scale, self.linear, self.factor, self.landing, outputs, convolution, self.shape, gate, blocks, sink
        )

    def run(self, x: Tensor, out: Outputs | Sink, buffers: Buffers, blocks: Blocks | None = None) -> None:
        """Launch the product."""
        gemv(self.product(x, out, buffers, blocks=blocks), buffers.position, buffers.pdl)


@dataclass(frozen=True)
class Outputs:
    """Where a product leaves its rows: int8 and float32 (B, N), each None if no row goes there."""

    codes: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class InputStage:
    """RMS norm of the residual stream and in_proj (or the head).

    ``lands``: the norm is a kernel of its own, which lands rows; otherwise the products apply its one number a row.
    """

    gain: Tensor
    epsilon: float
    projection: Projection
    lands: bool = True

    def input(self, sink: Sink, buffers: Buffers) -> tuple[Tensor, Blocks | None]:
        """What the products read, and how it was left."""
        if self.lands:
            return self.projection.input("normed", buffers), None
        return sink.left, Blocks(sink.channels, None, sink.gain, 1, self.epsilon, sink.squares, sink.scale)

    def norm(self, sink: Sink, buffers: Buffers) -> Iterator[Kernel]:
        """The norm's kernel, if there is one."""
        if self.lands:
            x, site = self.projection.input("normed", buffers), self.projection.site
            yield "norm", lambda: norm(
                sink.left, sink.squares, self.epsilon, site, x, buffers.row_scale, buffers.pdl
            )  # fmt: skip


@dataclass(frozen=True)
class OutputStage:
    """Gate norm (none in Mamba-1: no gain), rotation and out_proj.

    ``block``: where nothing rotates or quantizes what out_proj takes, the scan's programs leave it themselves, in
    blocks of so many channels; 0: a kernel of its own does. ``gated``: that kernel's part of gate and norm which the
    scan's programs do, so many channels each (0: none).
    """

    gain: Tensor | None
    epsilon: float
    groups: int
    middle: RowSite
    rotation: RotationPlan
    rows: RowRotation
    projection: Projection
    block: int = 0
    gated: int = 0

    def blocks(self, gate: Tensor | None, buffers: Buffers) -> Blocks | None:
        """How the scan leaves its row, if gated."""
        channels = self.block or self.gated
        if not channels:
            return None
        parts = self.projection.linear.columns // channels
        squares = None if self.gain is None else buffers.get("squares", parts)
        scale = buffers.get("block_scale", parts) if self.block and self.projection.halves else None
        return Blocks(channels, gate, self.gain, self.groups, self.epsilon, squares, scale)

    def left(self, scanned: Tensor, buffers: Buffers) -> Tensor:
        """Where the scan leaves its row."""
        return self.projection.input("rotated", buffers) if self.block else scanned


@dataclass(frozen=True)
class ScanParameters:
    """``dt_bias``, ``A`` (negative) and ``skip``: float32 (H,), or (E,), (E, N) and (E,) for Mamba-1."""

    dt_bias: Tensor
    A: Tensor
    skip: Tensor
    grid: StatePlan | None
    inputs: dict[str, InputPlan]

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernels take them."""
        return self.dt_bias, self.A, self.skip


@dataclass(frozen=True)
class LayerState:
    """``ring``: the convolution's last K inputs, int8 or float32 (K, B, C). ``state``: (B, H, P, N) or (B, E, N)."""

    ring: Tensor
    state: Tensor


def finish(head: InputStage, stream: Sink, logits: Tensor, buffers: Buffers) -> Iterator[Kernel]:
    """Final norm and head."""
    yield from head.norm(stream, buffers)
    x, norm = head.input(stream, buffers)
    yield "head", lambda: head.projection.run(x, Outputs(None, logits), buffers, norm)


def leave(
    stage: OutputStage, y: Tensor, gate: Tensor | None, blocks: Blocks | None, after: Sink, buffers: Buffers
) -> Iterator[Kernel]:
    """Gate, norm and rotation, as far as the scan has not done it (``blocks``); then the product, to the stream."""
    projection = stage.projection
    if stage.block:
        yield "out_proj", lambda: projection.run(y, after, buffers, blocks)
        return
    x, squares = projection.input("rotated", buffers), None if blocks is None else blocks.squares
    yield "rotate", lambda: rotate(
        y, gate if blocks is None else None, stage.gain, stage.epsilon, stage.groups, stage.rotation, stage.middle,
        projection.site, x, buffers.row_scale, buffers.pdl, squares,
    )  # fmt: skip
    yield "out_proj", lambda: projection.run(x, after, buffers)


@dataclass
class Buffers:
    """Static memory of a step. ``h``: the residual stream. ``position``: int32 (1,), the tokens taken in so far, modulo
    nothing. ``steps``: int64 (1,), runs of ``DecodePlan.step`` so far."""

    rows: int
    width: int
    device: torch.device
    pdl: bool
    memory: dict[tuple[str, int, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.h = torch.zeros(self.rows, self.width, device=self.device)
        self.row_scale = torch.ones(self.rows, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=self.device)

    def stream(self, stage: InputStage, channels: int) -> Sink:
        """The residual stream as it is left for a stage, by programs of ``channels`` each."""
        halves, parts = stage.projection.halves and not stage.lands, self.width // channels
        left = self.get("stream left", self.width * (2 if halves else 1), halves)
        scale = self.get("stream scale", parts) if halves else None
        return Sink(channels, self.h, stage.gain, left, self.get("stream squares", parts), scale)

    def count(self, counter: Tensor | None, product: Product) -> Count | None:
        """What those who need a product's rows wait for, if they do not wait for its whole kernel."""
        return None if counter is None else Count(counter, self.steps, product.programs)

    def get(self, name: str, features: int, integer: bool = False) -> Tensor:
        """int8 or float32 (rows, features), the same memory for the same name and size in every layer."""
        key = (name, features, torch.int8 if integer else torch.float32)
        if key not in self.memory:
            self.memory[key] = torch.zeros(self.rows, features, dtype=key[2], device=self.device)
        return self.memory[key]

    def outputs(self, name: str, projection: Projection) -> Outputs:
        """Memory for a product's rows."""
        landing, rows = projection.landing, projection.linear.rows
        codes = self.get(name, rows, True) if landing is not None and landing.any_codes else None
        values = self.get(name, rows) if landing is None or landing.any_values else None
        return Outputs(codes, values)

    def both(self, out: Outputs) -> tuple[Tensor, Tensor]:
        """Codes and values of a product; the one that it does not write stands in for the other."""
        first, second = out.codes, out.values
        if first is None:
            first = second
        assert first is not None
        return first, first if second is None else second
