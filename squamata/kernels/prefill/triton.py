"""Many tokens of B sequences on a GPU: the decode plan's weights and states, with kernels for many rows.

A Mamba-2 layer is six kernels (norm, in_proj, convolution, scan, gate + norm + rotation, out_proj with the residual), a
Mamba-1 layer eight. With one token a sequence this is also the decode step of large batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squamata.kernels.decode.triton import (
    Buffers,
    DecodePlan,
    InputStage,
    Kernel,
    Mamba1Layer,
    Mamba2Layer,
    Outputs,
    OutputStage,
    Projection,
    enter,
)
from squamata.kernels.gpu_gemm import LAND, PLAIN, RESIDUAL, SOFTPLUS, SPLIT, Finish, gemm
from squamata.kernels.gpu_norm import embed, greedy
from squamata.kernels.gpu_rows import norm_rows, rotate_rows
from squamata.kernels.gpu_sequence import Sequences, conv_rows, selective_rows, ssd_rows

FEW_SEQUENCES = 16  # up to which the head is a matrix-vector product


@dataclass
class Workspace:
    """Static memory of one pass over ``batch`` sequences of ``length`` places; every layer uses the same.

    ``exact``: float values stay float32 (to check kernels); otherwise bfloat16, and float16 for the scan's output.
    """

    batch: int
    length: int
    width: int
    device: torch.device
    exact: bool
    memory: dict[tuple[str, int, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = self.batch * self.length
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        self.lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        self.residual = torch.zeros(self.rows, self.width, device=self.device)
        self.row_scale = torch.ones(self.rows, device=self.device)
        self.offsets = torch.arange(self.batch, device=self.device) * self.length - 1
        self.last = torch.zeros_like(self.offsets)
        self.float = torch.float32 if self.exact else torch.bfloat16
        self.scanned = torch.float32 if self.exact else torch.float16

    def get(self, name: str, features: int, dtype: torch.dtype) -> Tensor:
        """(rows, features), the same memory for the same name, size and type."""
        key = (name, features, dtype)
        if key not in self.memory:
            self.memory[key] = torch.zeros(self.rows, features, dtype=dtype, device=self.device)
        return self.memory[key]

    def input_of(self, name: str, projection: Projection) -> Tensor:
        """Memory for what a projection reads, in the type that its weights meet."""
        integer = projection.linear.format.integer_activations
        return self.get(name, projection.linear.columns, torch.int8 if integer else self.float)

    def landed(self, name: str, projection: Projection) -> tuple[Tensor, Tensor]:
        """Codes and values of a projection's outputs; the one that is not written stands for the other."""
        landing, rows = projection.landing, projection.linear.rows
        codes = self.get(name, rows, torch.int8) if landing is not None and landing.any_codes else None
        values = self.get(name, rows, self.float) if landing is None or landing.values_anywhere else None
        first = codes if codes is not None else values
        assert first is not None
        return first, values if values is not None else first


@dataclass
class SequencePlan:
    """``step`` takes ``work.ids`` (B L,) and ``work.lengths`` (B,) to the logits of every sequence's last token.

    It moves the states, the position and the likeliest next ids of ``plan`` on. Places beyond a sequence's length may
    hold any id.
    """

    plan: DecodePlan
    work: Workspace

    def __post_init__(self) -> None:
        self.sequences = Sequences(self.work.lengths, self.plan.buffers.position, self.work.length)

    def kernels(self) -> Iterator[Kernel]:
        """Every launch, in order, with the name of what it does."""
        plan, work = self.plan, self.work
        yield "embedding", lambda: embed(work.ids, plan.table, plan.table_scale, work.residual, pdl=False)
        for layer in plan.layers:
            yield from self._mamba2(layer) if isinstance(layer, Mamba2Layer) else self._mamba1(layer)
        yield from self._head(plan.head, plan.buffers)
        yield "greedy", lambda: greedy(
            plan.logits, plan.scratch, plan.buffers.ids, plan.buffers.position, pdl=False, advance=work.length
        )

    def step(self) -> None:
        """Launch everything."""
        for _, launch in self.kernels():
            launch()

    def _product(self, projection: Projection, x: Tensor, finish: Finish) -> None:
        scale = self.work.row_scale if projection.site.span > 0 else None
        gemm(x, scale, projection.linear, projection.factor, projection.landing, finish)

    def _enter(self, stage: InputStage, x: Tensor) -> None:
        work, projection = self.work, stage.projection
        norm_rows(work.residual, stage.gain, stage.epsilon, projection.site, x, work.row_scale,
                  int(projection.linear.format))  # fmt: skip

    def _leave(self, stage: OutputStage, layer: Mamba1Layer | Mamba2Layer, entered: tuple[Tensor, Tensor],
               z_start: int) -> Iterator[Kernel]:  # fmt: skip
        work, projection = self.work, stage.projection
        y = work.get("y", projection.linear.columns, work.scanned)
        x = work.input_of("rotated", projection)
        yield "rotate", lambda: rotate_rows(
            y, entered, layer.scan.inputs["z"], z_start, stage.gain, stage.epsilon, stage.groups, stage.rows,
            stage.middle, projection.site, x, int(projection.linear.format),
        )  # fmt: skip
        yield "out_proj", lambda: self._product(projection, x, Finish(RESIDUAL, residual=work.residual))

    def _mamba2(self, layer: Mamba2Layer) -> Iterator[Kernel]:
        work, projection, scan = self.work, layer.entry.projection, layer.scan
        x = work.input_of("normed", projection)
        entered = work.landed("entered", projection)
        inner, channels = layer.exit.projection.linear.columns, layer.state.ring.shape[2]
        u = work.get("u", channels, torch.int8 if layer.conv.all_codes else work.float)
        taken = entered[0] if layer.state.ring.dtype == torch.int8 else entered[1]
        y = work.get("y", inner, work.scanned)
        yield "norm", lambda: self._enter(layer.entry, x)
        yield "in_proj", lambda: self._product(projection, x, Finish(LAND, *entered))
        yield "conv", lambda: conv_rows(
            taken, layer.starts[0] + inner, layer.state.ring, layer.conv, inner, self.sequences, u, 0
        )
        yield "scan", lambda: ssd_rows(
            u, layer.conv, entered, scan.inputs["dt"], layer.starts[1], (scan.dt_bias, scan.A, scan.skip),
            layer.state.state, scan.grid, layer.groups, layer.limit, self.sequences, y, layer.conv.uniform, work.exact,
        )  # fmt: skip
        yield from self._leave(layer.exit, layer, entered, layer.starts[0])

    def _mamba1(self, layer: Mamba1Layer) -> Iterator[Kernel]:
        work, projection, scan = self.work, layer.entry.projection, layer.scan
        inner, low_rank = layer.exit.projection.linear.columns, layer.low_rank
        x = work.input_of("normed", projection)
        entered = work.landed("entered", projection)
        u, dt_low = work.input_of("u", layer.x_proj), work.input_of("dt_low", layer.dt_proj)
        bc = work.get("bc", layer.x_proj.linear.rows - low_rank, torch.float32)
        dt, y = work.get("dt", inner, work.scanned), work.get("y", inner, work.scanned)
        taken = entered[0] if layer.state.ring.dtype == torch.int8 else entered[1]
        order = int(layer.x_proj.linear.format)
        yield "norm", lambda: self._enter(layer.entry, x)
        yield "in_proj", lambda: self._product(projection, x, Finish(LAND, *entered))
        yield "conv", lambda: conv_rows(taken, 0, layer.state.ring, layer.conv, inner, self.sequences, u, order)
        low = Finish(SPLIT, dt_low, bc, split_at=low_rank, split_format=int(layer.dt_proj.linear.format))
        yield "x_proj", lambda: self._product(layer.x_proj, u, low)
        softplus = Finish(SOFTPLUS, values=dt, shift=scan.dt_bias)
        yield "dt_proj", lambda: self._product(layer.dt_proj, dt_low, softplus)
        yield "scan", lambda: selective_rows(
            u, scan.inputs["u"], dt, bc, scan.A, scan.skip, layer.state.state, scan.grid, self.sequences, y, order
        )
        yield from self._leave(layer.exit, layer, entered, layer.z_start)

    def _head(self, head: InputStage, buffers: Buffers) -> Iterator[Kernel]:
        """Final norm and head of every sequence's last token."""
        work = self.work
        yield "last", self._take_last
        if work.batch <= FEW_SEQUENCES:
            yield from enter(head, Outputs(None, self.plan.logits), None, buffers, first=True, name="head")
            return
        site, linear = head.projection.site, head.projection.linear
        dtype = torch.int8 if linear.format.integer_activations else work.float
        x = torch.zeros(work.batch, linear.columns, dtype=dtype, device=work.device)
        yield "norm", lambda: norm_rows(
            buffers.h, head.gain, head.epsilon, site, x, buffers.row_scale, int(linear.format)
        )
        scale = buffers.row_scale if site.span > 0 else None
        yield "head", lambda: gemm(
            x, scale, linear, head.projection.factor, None, Finish(PLAIN, values=self.plan.logits)
        )

    def _take_last(self) -> None:
        """The residual of every sequence's last token: ``buffers.h``."""
        work = self.work
        torch.add(work.offsets, work.lengths, out=work.last)
        work.last.clamp_(min=0)  # a sequence without tokens has no last one
        torch.index_select(work.residual, 0, work.last, out=self.plan.buffers.h)
