"""A decode step on a GPU, layer by layer: what each kernel reads and writes, planned once, launched in order.

A Mamba-2 layer is five kernels, a Mamba-1 layer six, one less where nothing rotates out_proj's input; a handful of
microseconds each. Weights do not depend on what comes before, so with programmatic dependent launch a kernel streams
its first weights while its predecessors run. All buffers are static, so a step can be captured in a CUDA graph.

Who may read and write what, when
---------------------------------
A kernel lets the next one start before it waits itself, so that several are on the device at once, the last of them
before the first has run. Three rules make that safe.

1. *Every program waits for the kernel before it to have finished, before it ends.* So "the kernel before has finished"
   implies the same of all kernels before that one, in this token; and a token's first kernel (the embedding) is
   launched without programmatic dependence, after all of the last token. What a kernel reads before it has waited was
   written by the last token (states, rings, ``position``, ``steps``) or never changes.
2. *A kernel writes nothing that others read before it has waited*, for the kernel before it or for a counter. Then all
   readers of what those buffers held, which are shared by the layers, have finished.
3. *The scan waits for a counter*, not for the whole product before it, which also makes z: in a step its programs go on
   as soon as those that make its inputs have counted themselves (``Count``), and wait for the whole kernel before they
   touch z, at the latest before they end (rule 1). Each layer has a counter of its own, which only grows: a token's
   programs find it at ``steps`` times their number and leave it at ``steps + 1`` times, which is what the scan waits
   for. ``steps`` is raised by the token's last kernel, so it does not change while a token runs, and a scan that is let
   start before even the norm has run finds too small a number, never the full one of the layer or token before. What
   the scan writes by then: its layer's state, which nobody else reads, and ``scanned``, which the last layer's rotation
   has read. Proof: a program that counted itself had waited for its kernel's predecessor, with which, by rule 1, all
   kernels of the layers before have finished. No deadlock: the scan starts when every program of that product has
   started, so none of them waits for a place.

Only ``DecodePlan.step`` launches kernels that count and wait so, as it launches all of them in order. One by one, as
``kernels`` yields them, each waits for the whole kernel before and counts nothing, so the numbers still agree after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import Blocks, Convolution, Count, Landing, Product, Shape, gemv, gemv_pair, product
from squamata.kernels.gpu.norm import RotationPlan, RowSite, norm, rotate
from squamata.kernels.gpu.parts import PartNorms, norm_parts
from squamata.kernels.gpu.rows import RowRotation
from squamata.kernels.gpu.scan import InputPlan, StatePlan, selective_step, ssd_step
from squamata.kernels.gpu.tiles import Format, TiledLinear
from squamata.kernels.gpu.vocabulary import embed, greedy, greedy_scratch

SSD_CHANNELS = 16  # of a head, a program
COUNTER_WORDS = 16  # int64 between counters: a line of cache each

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
        out: Outputs,
        buffers: Buffers,
        convolution: Convolution | None = None,
        gate: bool = False,
        blocks: Blocks | None = None,
    ) -> Product:
        """The product for these rows, to be launched. ``blocks``: how the scan has left ``x``."""
        scale = buffers.row_scale if self.site.span > 0 or self.halves else None
        outputs = (out.codes, out.values)
        return product(x, scale, self.linear, self.factor, self.landing, outputs, convolution, self.shape, gate, blocks)

    def run(self, x: Tensor, out: Outputs, buffers: Buffers, blocks: Blocks | None = None) -> None:
        """Launch the product."""
        gemv(self.product(x, out, buffers, blocks=blocks), buffers.position, buffers.pdl)


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
    """Gate norm (none in Mamba-1: no gain), rotation and out_proj.

    ``block``: where nothing rotates or quantizes what out_proj takes, the scan's programs leave it themselves, in
    blocks of so many channels; 0: a kernel of its own does.
    """

    gain: Tensor | None
    epsilon: float
    groups: int
    middle: RowSite
    rotation: RotationPlan
    rows: RowRotation
    projection: Projection
    block: int = 0

    def blocks(self, gate: Tensor | None, buffers: Buffers) -> Blocks | None:
        """How the scan leaves what out_proj takes, if it does."""
        if not self.block:
            return None
        parts = self.projection.linear.columns // self.block
        squares = None if self.gain is None else buffers.get("squares", parts)
        scale = buffers.get("block_scale", parts) if self.projection.halves else None
        return Blocks(self.block, gate, self.gain, self.groups, self.epsilon, squares, scale)


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

    ``z_proj`` and ``scan_proj``: in_proj's rows of z, which come first, and the others.
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

    def kernels(self, buffers: Buffers, first: bool, counter: Tensor | None = None) -> Iterator[Kernel]:
        """What the layer launches, in order. ``counter``: its own, if all of it is launched, in a step."""
        inner, ring = self.exit.projection.linear.columns, self.state.ring
        x = self.entry.projection.input("normed", buffers)
        out, mixed = buffers.outputs("entered", self.scan_proj), buffers.get("mixed", ring.shape[2])
        scanned, gate = buffers.get("scanned", inner), buffers.get("gate", inner)
        entering = self.scan_proj.product(x, out, buffers, Convolution(self.conv, ring, mixed))
        gating = self.z_proj.product(x, Outputs(None, gate), buffers, gate=True)
        channels = min(SSD_CHANNELS, self.state.state.shape[2])
        after = buffers.count(counter, entering)
        blocks = self.exit.blocks(gate, buffers)
        left = scanned if blocks is None else self.exit.projection.input("rotated", buffers)
        yield "norm", lambda: enter(self.entry, x, buffers, first)
        yield "in_proj", lambda: gemv_pair(entering, gating, buffers.position, buffers.pdl, counter)
        yield "scan", lambda: ssd_step(
            mixed, buffers.both(out), self.scan.inputs["dt"], self.scan.tables, self.state.state, self.scan.grid,
            left, self.starts[1] - inner, self.groups, self.limit, channels, buffers.pdl, after, blocks,
        )  # fmt: skip
        yield from leave(self.exit, left, gate, blocks, buffers)


@dataclass(frozen=True)
class Mamba1Layer:
    """Plan of a Mamba-1 layer. ``z_start``: row of in_proj where z begins; ``low_rank``: rows of x_proj before B.

    ``conv_proj`` and ``z_proj``: in_proj's rows of x, which come first, and those of z, which stream beside x_proj.
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

    def kernels(self, buffers: Buffers, first: bool, counter: Tensor | None = None) -> Iterator[Kernel]:
        """What the layer launches, in order. ``counter``: not used: to count x_proj's few programs costs more than it
        gains (docs/log.md)."""
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
        blocks = self.exit.blocks(None, buffers)
        left = gated if blocks is None else self.exit.projection.input("rotated", buffers)
        yield "norm", lambda: enter(self.entry, x, buffers, first)
        yield "in_proj", lambda: gemv(entering, buffers.position, buffers.pdl)
        yield "x_proj", lambda: gemv_pair(mixing, gating, buffers.position, buffers.pdl)
        if self.norms is not None:
            assert raw.values is not None
            yield "part_norms", partial(norm_parts, raw.values, self.norms, low.codes, low.values)
        yield "scan", lambda: selective_step(
            u, gate, dt, buffers.both(low), self.scan.inputs, self.scan.tables, self.state.state, self.scan.grid,
            left, self.low_rank, buffers.pdl, blocks,
        )  # fmt: skip
        yield from leave(self.exit, left, None, blocks, buffers)

    def _normed(self, buffers: Buffers) -> Outputs:
        """Memory for what the norms leave."""
        assert self.norms is not None
        landing, width = self.norms.landing, sum(self.norms.sizes)
        codes = buffers.get("low_normed", width, True) if landing.any_codes else None
        return Outputs(codes, buffers.get("low_normed", width) if landing.any_values else None)


def enter(stage: InputStage, x: Tensor, buffers: Buffers, first: bool) -> None:
    """residual += h and norm, to ``x``, where the stage's product takes it."""
    site = stage.projection.site
    norm(buffers.h, buffers.residual, stage.gain, stage.epsilon, site, x, buffers.row_scale, first,
         buffers.pdl)  # fmt: skip


def finish(head: InputStage, logits: Tensor, buffers: Buffers, first: bool) -> Iterator[Kernel]:
    """Final norm and head."""
    x = head.projection.input("normed", buffers)
    yield "norm", lambda: enter(head, x, buffers, first)
    yield "head", lambda: head.projection.run(x, Outputs(None, logits), buffers)


def leave(
    stage: OutputStage, y: Tensor, gate: Tensor | None, blocks: Blocks | None, buffers: Buffers
) -> Iterator[Kernel]:
    """Gate (unless the scan has done it), norm and rotation, unless ``blocks``; then the product: the new h."""
    projection = stage.projection
    x = y
    if blocks is None:
        x = projection.input("rotated", buffers)
        yield "rotate", lambda: rotate(
            y, gate, stage.gain, stage.epsilon, stage.groups, stage.rotation, stage.middle, projection.site, x,
            buffers.row_scale, buffers.pdl,
        )  # fmt: skip
    yield "out_proj", lambda: projection.run(x, Outputs(None, buffers.h), buffers, blocks)


@dataclass
class Buffers:
    """Static memory of a step. ``position``: int32 (1,), the tokens taken in so far, modulo nothing. ``steps``: int64
    (1,), runs of ``DecodePlan.step`` so far."""

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
        self.steps = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=self.device)

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
        size = (len(self.layers), COUNTER_WORDS)
        self.counters = torch.zeros(size, dtype=torch.int64, device=self.buffers.device)

    def kernels(self, counted: bool = False) -> Iterator[Kernel]:
        """Every launch of one token, in order, with the name of what it does; each may be repeated without the others,
        unless ``counted``."""
        buffers = self.buffers
        yield "embedding", lambda: embed(buffers.ids, self.table, self.table_scale, buffers.h, pdl=False)
        for index, layer in enumerate(self.layers):
            yield from layer.kernels(buffers, index == 0, self.counters[index, :1] if counted else None)
        yield from finish(self.head, self.logits, buffers, first=not self.layers)
        steps = buffers.steps if counted else None
        yield "greedy", lambda: greedy(
            self.logits, self.scratch, buffers.ids, buffers.position, buffers.pdl, steps=steps
        )  # fmt: skip

    def step(self) -> None:
        """Launch one token. Its first kernel waits for all of the last token: states are read ahead of time later."""
        for _, launch in self.kernels(counted=True):
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
