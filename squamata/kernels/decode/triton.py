"""A decode step on a GPU, layer by layer: what each kernel reads and writes, planned once, launched in order.

A Mamba-2 layer is five kernels, a Mamba-1 layer eight, a handful of microseconds each; weights do not depend on what
comes before, so with programmatic dependent launch a kernel streams its first weights while its predecessors run.
All buffers are static, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.gpu_gemv import Landing, Shape, gemv
from squamata.kernels.gpu_norm import RotationPlan, RowSite, embed, greedy, greedy_scratch, norm, rotate
from squamata.kernels.gpu_parts import PartNorms, norm_parts
from squamata.kernels.gpu_rows import RowRotation
from squamata.kernels.gpu_scan import ConvolutionPlan, InputPlan, StatePlan, conv_step, selective_step, ssd_step
from squamata.kernels.gpu_tiles import Format, TiledLinear

SSD_CHANNELS = 32  # of a head, a program

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

    def run(self, x: Tensor, out: Outputs, ring: Tensor | None, buffers: Buffers) -> None:
        scale = buffers.row_scale if self.site.span > 0 or self.halves else None
        gemv(x, scale, self.linear, self.factor, self.landing, out.codes, out.values, ring, buffers.position,
             self.shape, buffers.pdl)  # fmt: skip


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


@dataclass(frozen=True)
class LayerState:
    """``ring``: the convolution's last K inputs, int8 or float32 (K, B, C). ``state``: (B, H, P, N) or (B, E, N)."""

    ring: Tensor
    state: Tensor


@dataclass(frozen=True)
class Mamba2Layer:
    """Plan of a Mamba-2 layer. ``starts``: rows of in_proj where z and dt begin."""

    entry: InputStage
    conv: ConvolutionPlan
    scan: ScanParameters
    exit: OutputStage
    state: LayerState
    starts: tuple[int, int]
    groups: int
    limit: tuple[float, float]

    def kernels(self, buffers: Buffers, first: bool) -> Iterator[Kernel]:
        """What the layer launches, in order."""
        out = buffers.outputs("entered", self.entry.projection)
        gated = buffers.get("gated", self.exit.projection.linear.columns)
        channels = min(SSD_CHANNELS, self.state.state.shape[2])
        yield from enter(self.entry, out, self.state.ring, buffers, first, "in_proj")
        yield "conv_scan", lambda: ssd_step(
            self.state.ring, *buffers.both(out), self.conv, self.scan.inputs["dt"], self.scan.inputs["z"],
            self.scan.dt_bias, self.scan.A, self.scan.skip, self.state.state, self.scan.grid, buffers.position,
            gated, self.starts, self.groups, self.limit, channels, buffers.pdl,
        )  # fmt: skip
        yield from leave(self.exit, gated, buffers)


@dataclass(frozen=True)
class Mamba1Layer:
    """Plan of a Mamba-1 layer. ``z_start``: row of in_proj where z begins; ``low_rank``: rows of x_proj before B.
    ``norms``: of what x_proj leaves, in FalconMamba.
    """

    entry: InputStage
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
        entered = buffers.outputs("entered", self.entry.projection)
        u = buffers.get("u", inner, self.x_proj.linear.format.integer_activations)
        raw = buffers.outputs("low", self.x_proj)
        low, dt = raw if self.norms is None else self._normed(buffers), buffers.outputs("dt", self.dt_proj)
        dt_low = low.codes if self.dt_proj.linear.format.integer_activations else low.values
        assert dt_low is not None
        gated = buffers.get("gated", inner)
        yield from enter(self.entry, entered, self.state.ring, buffers, first, "in_proj")
        yield (
            "conv",
            lambda: conv_step(self.state.ring, self.conv, buffers.position, u, u.dtype == torch.int8, buffers.pdl),
        )
        yield "x_proj", lambda: self.x_proj.run(u, raw, None, buffers)
        if self.norms is not None:
            assert raw.values is not None
            yield "part_norms", partial(norm_parts, raw.values, self.norms, low.codes, low.values)
        yield "dt_proj", lambda: self.dt_proj.run(dt_low[:, : self.low_rank], dt, None, buffers)
        yield "scan", lambda: selective_step(
            u, buffers.both(entered), buffers.both(dt), buffers.both(low), self.scan.inputs, self.scan.dt_bias,
            self.scan.A, self.scan.skip, self.state.state, self.scan.grid, gated, (self.z_start, self.low_rank),
            buffers.pdl,
        )  # fmt: skip
        yield from leave(self.exit, gated, buffers)

    def _normed(self, buffers: Buffers) -> Outputs:
        """Memory for what the norms leave."""
        assert self.norms is not None
        landing, width = self.norms.landing, sum(self.norms.sizes)
        codes = buffers.get("low_normed", width, True) if landing.any_codes else None
        return Outputs(codes, buffers.get("low_normed", width) if landing.any_values else None)


def enter(
    stage: InputStage, out: Outputs, ring: Tensor | None, buffers: Buffers, first: bool, name: str
) -> Iterator[Kernel]:
    """residual += h and norm, then the product called ``name``."""
    projection = stage.projection
    x = projection.input("normed", buffers)
    yield (
        "norm",
        lambda: norm(
            buffers.h,
            buffers.residual,
            stage.gain,
            stage.epsilon,
            projection.site,
            x,
            buffers.row_scale,
            first,
            buffers.pdl,
        ),
    )
    yield name, lambda: projection.run(x, out, ring, buffers)


def leave(stage: OutputStage, gated: Tensor, buffers: Buffers) -> Iterator[Kernel]:
    """Gate norm and rotation, then the product: the new h."""
    projection = stage.projection
    x = projection.input("rotated", buffers)
    yield (
        "rotate",
        lambda: rotate(
            gated,
            stage.gain,
            stage.epsilon,
            stage.groups,
            stage.rotation,
            stage.middle,
            projection.site,
            x,
            buffers.row_scale,
            buffers.pdl,
        ),
    )
    yield "out_proj", lambda: projection.run(x, Outputs(None, buffers.h), None, buffers)


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
        yield from enter(self.head, Outputs(None, self.logits), None, buffers, first=not self.layers, name="head")
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
