"""A decode step on a GPU, layer by layer: what each kernel reads and writes, planned once, launched in order.

A Mamba-2 layer is five kernels, a Mamba-1 layer six, a handful of microseconds each; weights do not depend on what
comes before, so with programmatic dependent launch a kernel streams its first weights while its predecessors run.
All buffers are static, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.gpu_conv import ConvolutionPlan
from squamata.kernels.gpu_gemv import Convolution, Landing, Product, Shape, gemv, gemv_pair, product
from squamata.kernels.gpu_norm import RotationPlan, RowSite, norm, rotate
from squamata.kernels.gpu_parts import PartNorms, norm_parts
from squamata.kernels.gpu_rows import RowRotation
from squamata.kernels.gpu_scan import InputPlan, StatePlan, selective_step, ssd_step
from squamata.kernels.gpu_tiles import Format, TiledLinear
from squamata.kernels.gpu_vocabulary import embed, greedy, greedy_scratch

SSD_CHANNELS = 16  # of a head, a program
# Bytes of Mamba-1's rows of z up to which they are made beside x_proj; larger ones follow the rows of x at once, while
# x_proj runs. Microseconds a layer, beside / at once, mamba-2.8b on an H200: W4A8 13.9 / 14.6, W8A8 17.4 / 16.9.
SMALL_BYTES = 2**23

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
        self, x: Tensor, out: Outputs, buffers: Buffers, convolution: Convolution | None = None, gate: bool = False
    ) -> Product:
        """The product for these rows, to be launched."""
        scale = buffers.row_scale if self.site.span > 0 or self.halves else None
        return product(
            x, scale, self.linear, self.factor, self.landing, (out.codes, out.values), convolution, self.shape, gate
        )

    def run(self, x: Tensor, out: Outputs, buffers: Buffers) -> None:
        """Launch the product."""
        gemv(self.product(x, out, buffers), buffers.position, buffers.pdl)


@dataclass(frozen=True)
class Outputs:
    """Where a product leaves its rows: int8 and float32 (B, N), each None if no row goes there."""

    codes: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class InputStage:
    """Residual add, RMS norm and in_proj (or the head)."""

    gain: Tensor
    epsilon: float
    projection: Projection


@dataclass(frozen=True)
class OutputStage:
    """Gate norm (none in Mamba-1: no gain), rotation and out_proj."""

    gain: Tensor | None
    epsilon: float
    groups: int
    middle: RowSite
    rotation: RotationPlan
    rows: RowRotation
    projection: Projection


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


@dataclass(frozen=True)
class Mamba2Layer:
    """Plan of a Mamba-2 layer. ``starts``: rows of in_proj where z and dt begin.

    ``z_proj`` and ``scan_proj``: in_proj's rows of z, which come first, and the others, which the scan waits for.
    """

    entry: InputStage
    z_proj: Projection
    scan_proj: Projection
    conv: ConvolutionPlan
    scan: ScanParameters
    exit: OutputStage
    state: LayerState
    starts: tuple[int, int]
    groups: int
    limit: tuple[float, float]

    def kernels(self, buffers: Buffers, first: bool) -> Iterator[Kernel]:
        """What the layer launches, in order."""
        inner, ring = self.exit.projection.linear.columns, self.state.ring
        x = self.entry.projection.input("normed", buffers)
        out, mixed = buffers.outputs("entered", self.scan_proj), buffers.get("mixed", ring.shape[2])
        scanned, gate = buffers.get("scanned", inner), buffers.get("gate", inner)
        entering = self.scan_proj.product(x, out, buffers, Convolution(self.conv, ring, mixed))
        gating = self.z_proj.product(x, Outputs(None, gate), buffers, gate=True)
        channels = min(SSD_CHANNELS, self.state.state.shape[2])
        yield "norm", lambda: enter(self.entry, x, buffers, first)
        yield "in_proj", lambda: gemv_pair(entering, gating, buffers.position, buffers.counter, buffers.pdl)
        yield "scan", lambda: ssd_step(
            mixed, buffers.both(out), self.scan.inputs["dt"], self.scan.tables, self.state.state, self.scan.grid,
            buffers.counter, entering.programs, scanned, self.starts[1] - inner, self.groups, self.limit, channels,
            buffers.pdl,
        )  # fmt: skip
        yield from leave(self.exit, scanned, gate, buffers)


@dataclass(frozen=True)
class Mamba1Layer:
    """Plan of a Mamba-1 layer. ``z_start``: row of in_proj where z begins; ``low_rank``: rows of x_proj before B.

    ``conv_proj`` and ``z_proj``: in_proj's rows of x, which come first, and those of z.
    ``norms``: of what x_proj leaves, in FalconMamba.
    """

    entry: InputStage
    conv_proj: Projection
    z_proj: Projection
    conv: ConvolutionPlan
    x_proj: Projection
    dt_proj: Projection
    scan: ScanParameters
    exit: OutputStage
    state: LayerState
    z_start: int
    low_rank: int
    norms: PartNorms | None = None

    def kernels(self, buffers: Buffers, first: bool) -> Iterator[Kernel]:
        """What the layer launches, in order."""
        inner = self.exit.projection.linear.columns
        x = self.entry.projection.input("normed", buffers)
        u = buffers.get("u", inner, self.x_proj.linear.format.integer_activations)
        gate, gated = buffers.get("gate", inner), buffers.get("gated", inner)
        raw, nothing = buffers.outputs("low", self.x_proj), Outputs(None, gate)
        low = raw if self.norms is None else self._normed(buffers)
        dt_low = low.codes if self.dt_proj.linear.format.integer_activations else low.values
        assert dt_low is not None
        entering = self.conv_proj.product(x, nothing, buffers, Convolution(self.conv, self.state.ring, u))
        gating = self.z_proj.product(x, nothing, buffers, gate=True)
        mixing = self.x_proj.product(u, raw, buffers)
        dt = self.dt_proj.product(dt_low[:, : self.low_rank], nothing, buffers)
        yield "norm", lambda: enter(self.entry, x, buffers, first)
        if self.z_proj.linear.nbytes <= SMALL_BYTES:
            yield "in_proj", lambda: gemv(entering, buffers.position, buffers.pdl)
            yield "x_proj", lambda: gemv_pair(mixing, gating, buffers.position, buffers.counter, buffers.pdl)
        else:
            after = (buffers.counter, entering.programs)
            yield "in_proj", lambda: gemv_pair(entering, gating, buffers.position, buffers.counter, buffers.pdl)
            yield "x_proj", lambda: gemv(mixing, buffers.position, buffers.pdl, after)
        if self.norms is not None:
            assert raw.values is not None
            yield "part_norms", partial(norm_parts, raw.values, self.norms, low.codes, low.values)
        yield "scan", lambda: selective_step(
            u, gate, dt, buffers.both(low), self.scan.inputs, self.scan.tables, self.state.state, self.scan.grid,
            gated, self.low_rank, buffers.pdl,
        )  # fmt: skip
        yield from leave(self.exit, gated, None, buffers)

    def _normed(self, buffers: Buffers) -> Outputs:
        """Memory for what the norms leave."""
        assert self.norms is not None
        landing, width = self.norms.landing, sum(self.norms.sizes)
        codes = buffers.get("low_normed", width, True) if landing.any_codes else None
        return Outputs(codes, buffers.get("low_normed", width) if landing.any_values else None)


def enter(stage: InputStage, x: Tensor, buffers: Buffers, first: bool) -> None:
    """residual += h and norm, to ``x``, where the stage's product takes it."""
    site = stage.projection.site
    norm(buffers.h, buffers.residual, stage.gain, stage.epsilon, site, x, buffers.row_scale, buffers.counter, first,
         buffers.pdl)  # fmt: skip


def finish(head: InputStage, logits: Tensor, buffers: Buffers, first: bool) -> Iterator[Kernel]:
    """Final norm and head."""
    x = head.projection.input("normed", buffers)
    yield "norm", lambda: enter(head, x, buffers, first)
    yield "head", lambda: head.projection.run(x, Outputs(None, logits), buffers)


def leave(stage: OutputStage, y: Tensor, gate: Tensor | None, buffers: Buffers) -> Iterator[Kernel]:
    """Gate (unless the scan has done it), norm and rotation, then the product: the new h."""
    projection = stage.projection
    x = projection.input("rotated", buffers)
    yield "rotate", lambda: rotate(
        y, gate, stage.gain, stage.epsilon, stage.groups, stage.rotation, stage.middle, projection.site, x,
        buffers.row_scale, buffers.pdl,
    )  # fmt: skip
    yield "out_proj", lambda: projection.run(x, Outputs(None, buffers.h), buffers)


@dataclass
class Buffers:
    """Static memory of a step. ``position``: int32 (1,), the tokens taken in so far, modulo nothing."""

    rows: int
    width: int
    device: torch.device
    pdl: bool
    memory: dict[tuple[str, int, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.h = torch.zeros(self.rows, self.width, device=self.device)
        self.residual = torch.zeros_like(self.h)
        self.row_scale = torch.ones(self.rows, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.counter = torch.zeros_like(self.position)
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=self.device)

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


@dataclass
class DecodePlan:
    """A whole model: ``step`` takes ``buffers.ids`` to ``logits`` (B, V), and puts the likeliest next ids back."""

    table: Tensor
    table_scale: Tensor | None
    layers: list[Mamba1Layer | Mamba2Layer]
    head: InputStage
    buffers: Buffers

    def __post_init__(self) -> None:
        vocabulary = self.head.projection.linear.rows
        self.logits = self.buffers.get("logits", vocabulary)
        self.scratch = greedy_scratch(self.buffers.rows, vocabulary, self.buffers.device)

    def kernels(self) -> Iterator[Kernel]:
        """Every launch of one token, in order, with the name of what it does."""
        buffers = self.buffers
        yield "embedding", lambda: embed(buffers.ids, self.table, self.table_scale, buffers.h, pdl=False)
        for index, layer in enumerate(self.layers):
            yield from layer.kernels(buffers, first=index == 0)
        yield from finish(self.head, self.logits, buffers, first=not self.layers)
        yield "greedy", lambda: greedy(self.logits, self.scratch, buffers.ids, buffers.position, buffers.pdl)

    def step(self) -> None:
        """Launch one token. Its first kernel waits for all of the last token: states are read ahead of time later."""
        for _, launch in self.kernels():
            launch()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step streams (one row of the embedding left out)."""
        return sum(projection.linear.nbytes for projection in self.projections())

    @property
    def state_bytes(self) -> int:
        """Bytes of state that a step reads and writes, for all sequences."""
        return sum(2 * layer.state.state.nbytes + layer.state.ring.nbytes for layer in self.layers)

    def projections(self) -> list[Projection]:
        """Every product of a step."""
        found = []
        for layer in self.layers:
            middle = [layer.x_proj, layer.dt_proj] if isinstance(layer, Mamba1Layer) else []
            found += [layer.entry.projection, *middle, layer.exit.projection]
        return [*found, self.head.projection]
