"""A decode step on a GPU, layer by layer: what each kernel reads and writes, planned once, launched in order.

A Mamba-2 layer is five kernels, a Mamba-1 layer six, a handful of microseconds each: one less where in_proj takes float
or 16-bit activations, because the norm's one number can then wait (``gpu.stream``), and one less where nothing rotates
out_proj's input. Weights do not depend on what comes before, so with programmatic dependent launch a kernel streams its
first weights while its predecessors run. All buffers are static, so a step can be captured in a CUDA graph.

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
   the scan writes by then: its layer's state, which nobody else reads, and, if it does not gate, ``scanned``, which the
   last layer's rotation has read. Proof: a program that counted itself had waited for its kernel's predecessor, by rule
   1 with all kernels of the layers before. No deadlock: the scan starts when every program of that product has
   started, so none of them waits for a place.

Only ``DecodePlan.step`` launches kernels that count and wait so, as it launches all of them in order. One by one, as
``kernels`` yields them, each waits for the whole kernel before and counts nothing, so the numbers still agree after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.decode.gpu_stages import (
    Buffers,
    InputStage,
    Kernel,
    LayerState,
    Outputs,
    OutputStage,
    Projection,
    ScanParameters,
    finish,
    leave,
)
from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import Convolution, gemv, gemv_pair
from squamata.kernels.gpu.parts import PartNorms, norm_parts
from squamata.kernels.gpu.scan import selective_step, ssd_step
from squamata.kernels.gpu.stream import Sink
from squamata.kernels.gpu.vocabulary import embed, greedy, greedy_scratch

SSD_CHANNELS = 16  # of a head, a program
COUNTER_WORDS = 16  # int64 between counters: a line of cache each


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

    def kernels(self, buffers: Buffers, before: Sink, after: Sink, counter: Tensor | None = None) -> Iterator[Kernel]:
        """What the layer launches, in order. ``before``, ``after``: the residual stream as left for this layer and the
        next; ``counter``: the layer's own, if all of it is launched, in a step."""
        inner, ring = self.exit.projection.linear.columns, self.state.ring
        x, norm = self.entry.input(before, buffers)
        out, mixed = buffers.outputs("entered", self.scan_proj), buffers.get("mixed", ring.shape[2])
        scanned, gate = buffers.get("scanned", inner), buffers.get("gate", inner)
        entering = self.scan_proj.product(x, out, buffers, Convolution(self.conv, ring, mixed), blocks=norm)
        gating = self.z_proj.product(x, Outputs(None, gate), buffers, gate=True, blocks=norm)
        channels = min(SSD_CHANNELS, self.state.state.shape[2])
        count = buffers.count(counter, entering)
        blocks = self.exit.blocks(gate, buffers)
        left = self.exit.left(scanned, buffers)
        yield from self.entry.norm(before, buffers)
        yield "in_proj", lambda: gemv_pair(entering, gating, buffers.position, buffers.pdl, counter)
        yield "scan", lambda: ssd_step(
            mixed, buffers.both(out), self.scan.inputs["dt"], self.scan.tables, self.state.state, self.scan.grid,
            left, self.starts[1] - inner, self.groups, self.limit, channels, buffers.pdl, count, blocks,
        )  # fmt: skip
        yield from leave(self.exit, left, gate, blocks, after, buffers)


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

    def kernels(self, buffers: Buffers, before: Sink, after: Sink, counter: Tensor | None = None) -> Iterator[Kernel]:
        """What the layer launches, in order. ``before``, ``after``: the residual stream as left for this layer and the
        next; ``counter``: not used: to count x_proj's few programs costs more than it gains (docs/log.md)."""
        inner = self.exit.projection.linear.columns
        x, norm = self.entry.input(before, buffers)
        u = buffers.get("u", inner, self.x_proj.linear.format.integer_activations)
        gate, gated = buffers.get("gate", inner), buffers.get("gated", inner)
        raw, nothing = buffers.outputs("low", self.x_proj), Outputs(None, gate)
        low = raw if self.norms is None else self._normed(buffers)
        dt_low = low.codes if self.dt_proj.linear.format.integer_activations else low.values
        assert dt_low is not None
        convolution = Convolution(self.conv, self.state.ring, u)
        entering = self.conv_proj.product(x, nothing, buffers, convolution, blocks=norm)
        gating = self.z_proj.product(x, nothing, buffers, gate=True, blocks=norm)
        mixing = self.x_proj.product(u, raw, buffers)
        dt = self.dt_proj.product(dt_low[:, : self.low_rank], nothing, buffers)
        blocks = self.exit.blocks(None, buffers)
        left = self.exit.left(gated, buffers)
        yield from self.entry.norm(before, buffers)
        yield "in_proj", lambda: gemv(entering, buffers.position, buffers.pdl)
        yield "x_proj", lambda: gemv_pair(mixing, gating, buffers.position, buffers.pdl)
        if self.norms is not None:
            assert raw.values is not None
            yield "part_norms", partial(norm_parts, raw.values, self.norms, low.codes, low.values)
        yield "scan", lambda: selective_step(
            u, gate, dt, buffers.both(low), self.scan.inputs, self.scan.tables, self.state.state, self.scan.grid,
            left, self.low_rank, buffers.pdl, blocks,
        )  # fmt: skip
        yield from leave(self.exit, left, None, blocks, after, buffers)

    def _normed(self, buffers: Buffers) -> Outputs:
        """Memory for what the norms leave."""
        assert self.norms is not None
        landing, width = self.norms.landing, sum(self.norms.sizes)
        codes = buffers.get("low_normed", width, True) if landing.any_codes else None
        return Outputs(codes, buffers.get("low_normed", width) if landing.any_values else None)


@dataclass
class DecodePlan:
    """A whole model: ``step`` takes ``buffers.ids`` to ``logits`` (B, V), and puts the likeliest next ids back.

    ``streams``: the residual stream as it is left for every layer, and for the head.
    """

    table: Tensor
    table_scale: Tensor | None
    layers: list[Mamba1Layer | Mamba2Layer]
    head: InputStage
    buffers: Buffers

    def __post_init__(self) -> None:
        vocabulary = self.head.projection.linear.rows
        self.logits = self.buffers.get("logits", vocabulary)
        self.scratch = greedy_scratch(self.buffers.rows, vocabulary, self.buffers.device)
        tiles = [layer.exit.projection.linear.tile_rows for layer in self.layers] or [1]
        stages = [layer.entry for layer in self.layers] + [self.head]
        self.streams = [
            self.buffers.stream(stage, size) for stage, size in zip(stages, tiles[:1] + tiles, strict=False)
        ]
        size = (len(self.layers), COUNTER_WORDS)
        self.counters = torch.zeros(size, dtype=torch.int64, device=self.buffers.device)

    def kernels(self, counted: bool = False) -> Iterator[Kernel]:
        """Every launch of one token, in order, with the name of what it does; each may be repeated without the others,
        unless ``counted``."""
        buffers = self.buffers
        yield "embedding", lambda: embed(buffers.ids, self.table, self.table_scale, self.streams[0], pdl=False)
        for index in range(len(self.layers)):
            yield from self.layer(index, counted)
        yield from finish(self.head, self.streams[-1], self.logits, buffers)
        steps = buffers.steps if counted else None
        yield "greedy", lambda: greedy(
            self.logits, self.scratch, buffers.ids, buffers.position, buffers.pdl, steps=steps
        )  # fmt: skip

    def layer(self, index: int, counted: bool = False) -> Iterator[Kernel]:
        """The launches of one layer."""
        counter = self.counters[index, :1] if counted else None
        return self.layers[index].kernels(self.buffers, self.streams[index], self.streams[index + 1], counter)

    def begin(self, index: int, stream: Tensor) -> None:
        """Put a residual stream, float32 (B, D), before a layer or the head."""
        rows = torch.arange(self.buffers.rows, device=self.buffers.device)
        embed(rows, stream.to(self.buffers.device).contiguous(), None, self.streams[index], pdl=False)

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
