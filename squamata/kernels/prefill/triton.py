"""Many tokens of B sequences on a GPU: the decode plan's weights and states, with kernels for many rows.

A Mamba-2 layer is six kernels (norm, in_proj, convolution, scan, gate + norm + rotation, out_proj with the residual), a
Mamba-1 layer eight. With one token a sequence this is also the decode step of large batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.decode.triton import (
    Buffers,
    DecodePlan,
    InputStage,
    Kernel,
    Mamba1Layer,
    Mamba2Layer,
    OutputStage,
    Projection,
    finish,
)
from squamata.kernels.gpu.expand import (
    OPERAND,
    as_rows,
    expand,
    finish_sums,
    in_rows,
    multiply,
    rows_of,
    scratch_bytes,
)
from squamata.kernels.gpu.gemm import LAND, PLAIN, RESIDUAL, SOFTPLUS, SPLIT, Finish, gemm
from squamata.kernels.gpu.parts import norm_parts_apart
from squamata.kernels.gpu.rows import norm_rows, rotate_rows
from squamata.kernels.gpu.selective import selective_rows
from squamata.kernels.gpu.sequence import Sequences, conv_rows
from squamata.kernels.gpu.ssd import ScanScratch, scan_scratch, ssd_rows
from squamata.kernels.gpu.tiles import TiledLinear
from squamata.kernels.gpu.vocabulary import embed, greedy

FEW_SEQUENCES = 16  # up to which the head is a matrix-vector product
# Rows of activations, and outputs and columns of a weight, from which its layout by rows pays
ROWS_FROM, OUTPUTS_FROM, COLUMNS_FROM = 128, 64, 512


@dataclass
class Workspace:
    """Static memory of one pass over ``batch`` sequences of ``length`` places; every layer uses the same.

    ``exact``: float values stay float32 (to check kernels); otherwise bfloat16, and float16 for the scan's output.
    ``keep``: hold ``copies`` of the weights laid out by rows, rather than lay them out for every pass.
    """

    batch: int
    length: int
    width: int
    device: torch.device
    exact: bool
    keep: bool = False
    copies: dict[int, Tensor] = field(default_factory=dict)
    memory: dict[tuple[str, int, torch.dtype], Tensor] = field(default_factory=dict)
    sums: Tensor | None = None
    scratch: Tensor | None = None
    of_states: dict[torch.Size, ScanScratch] = field(default_factory=dict)

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

    def scan(self, state: Tensor) -> ScanScratch:
        """Scratch of Mamba-2's scan for a state of this shape."""
        if state.shape not in self.of_states:
            self.of_states[state.shape] = scan_scratch(self.batch, self.length, state, self.float)
        return self.of_states[state.shape]

    def by_rows(self, linear: TiledLinear) -> bool:
        """True if the product wants its weight laid out by rows (``gpu.expand``)."""
        large = self.rows >= ROWS_FROM and linear.rows >= OUTPUTS_FROM and linear.columns >= COLUMNS_FROM
        return large and linear.format in OPERAND and (linear.format.integer_activations or not self.exact)

    def input_of(self, name: str, projection: Projection) -> Tensor:
        """Memory for what a projection reads, in the type that its weights meet."""
        integer = projection.linear.format.integer_activations
        return self.get(name, projection.linear.columns, torch.int8 if integer else self.float)

    def sums_of(self, linear: TiledLinear) -> Tensor:
        """Memory for a library product's outputs: the same bytes for all."""
        needed = self.rows * linear.rows
        if self.sums is None or self.sums.numel() < needed:
            self.sums = torch.zeros(needed, device=self.device)
        return self.sums[:needed].view(self.rows, linear.rows)

    def weight_of(self, linear: TiledLinear) -> tuple[Tensor, bool]:
        """Memory for a weight laid out by rows, and whether it has to be written for every product.

        A copy that is kept is shared by all workspaces; without one, all products share the same bytes.
        """
        if in_rows(linear):
            return rows_of(linear, linear.words), False
        key = linear.words.data_ptr()
        if key in self.copies:
            return self.copies[key], False
        if self.keep:
            self.copies[key] = rows_of(
                linear, torch.zeros(scratch_bytes(linear), dtype=torch.uint8, device=self.device)
            )
            expand(linear, self.copies[key])
            return self.copies[key], False
        if self.scratch is None or self.scratch.numel() < scratch_bytes(linear):
            self.scratch = torch.zeros(scratch_bytes(linear), dtype=torch.uint8, device=self.device)
        return rows_of(linear, self.scratch), True

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
        yield (
            "greedy",
            lambda: greedy(
                plan.logits, plan.scratch, plan.buffers.ids, plan.buffers.position, pdl=False, advance=work.length
            ),
        )

    def step(self) -> None:
        """Launch everything."""
        for _, launch in self.kernels():
            launch()

    def _product(self, name: str, projection: Projection, x: Tensor, finish: Finish) -> Iterator[Kernel]:
        """One fused product, or the library's with what surrounds it."""
        scale = self.work.row_scale if projection.site.span > 0 else None
        linear, factor, landing = projection.linear, projection.factor, projection.landing
        if not self.work.by_rows(linear):
            yield name, lambda: gemm(x, scale, linear, factor, landing, finish)
            return
        weight, written = self.work.weight_of(linear)
        if written:
            yield name + " rows", lambda: expand(linear, weight)
        if linear.format.integer_activations:
            rows = as_rows(linear, weight)
            yield name, lambda: gemm(x, scale, rows, factor, landing, finish)
            return
        sums = self.work.sums_of(linear)
        yield name, lambda: multiply(x, weight, sums)
        yield name + " finish", lambda: finish_sums(sums, scale, linear, factor, landing, finish)

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
            stage.middle, projection.site, x,
        )  # fmt: skip
        yield from self._product("out_proj", projection, x, Finish(RESIDUAL, residual=work.residual))

    def _mamba2(self, layer: Mamba2Layer) -> Iterator[Kernel]:
        work, projection, scan = self.work, layer.entry.projection, layer.scan
        x = work.input_of("normed", projection)
        entered = work.landed("entered", projection)
        inner, channels = layer.exit.projection.linear.columns, layer.state.ring.shape[2]
        u, codes = work.get("u", channels, work.float), layer.conv.all_codes and layer.conv.uniform
        taken = entered[0] if layer.state.ring.dtype == torch.int8 else entered[1]
        y = work.get("y", inner, work.scanned)
        yield "norm", lambda: self._enter(layer.entry, x)
        yield from self._product("in_proj", projection, x, Finish(LAND, *entered))
        yield (
            "conv",
            lambda: conv_rows(
                taken, layer.starts[0] + inner, layer.state.ring, layer.conv, inner, self.sequences, u, codes, 0
            ),
        )
        yield "scan", lambda: ssd_rows(
            u, codes, layer.conv, entered, scan.inputs["dt"], layer.starts[1], (scan.dt_bias, scan.A, scan.skip),
            work.scan(layer.state.state), layer.state.state, scan.grid, layer.groups, layer.limit, self.sequences, y,
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
        yield from self._product("in_proj", projection, x, Finish(LAND, *entered))
        yield (
            "conv",
            lambda: conv_rows(
                taken, 0, layer.state.ring, layer.conv, inner, self.sequences, u, u.dtype == torch.int8, order
            ),
        )
        low_order = int(layer.dt_proj.linear.format)
        if layer.norms is None:
            low = Finish(SPLIT, dt_low, bc, split_at=low_rank, split_format=low_order)
            yield from self._product("x_proj", layer.x_proj, u, low)
        else:
            raw = work.get("low", layer.x_proj.linear.rows, torch.float32)
            yield from self._product("x_proj", layer.x_proj, u, Finish(PLAIN, values=raw))
            yield "part_norms", partial(norm_parts_apart, raw, layer.norms, dt_low, bc, low_order)
        softplus = Finish(SOFTPLUS, values=dt, shift=scan.dt_bias)
        yield from self._product("dt_proj", layer.dt_proj, dt_low, softplus)
        yield (
            "scan",
            lambda: selective_rows(
                u, scan.inputs["u"], dt, bc, scan.A, scan.skip, layer.state.state, scan.grid, self.sequences, y, order
            ),
        )
        yield from self._leave(layer.exit, layer, entered, layer.z_start)

    def _head(self, head: InputStage, buffers: Buffers) -> Iterator[Kernel]:
        """Final norm and head of every sequence's last token."""
        work = self.work
        yield "last", self._take_last
        if work.batch <= FEW_SEQUENCES:
            yield from finish(head, self.plan.logits, buffers, first=True)
            return
        site, linear = head.projection.site, head.projection.linear
        dtype = torch.int8 if linear.format.integer_activations else work.float
        x = work.get("head", linear.columns, dtype)[: work.batch]
        yield (
            "norm",
            lambda: norm_rows(buffers.h, head.gain, head.epsilon, site, x, buffers.row_scale, int(linear.format)),
        )
        scale = buffers.row_scale if site.span > 0 else None
        yield (
            "head",
            lambda: gemm(x, scale, linear, head.projection.factor, None, Finish(PLAIN, values=self.plan.logits)),
        )

    def _take_last(self) -> None:
        """The residual of every sequence's last token: ``buffers.h``."""
        work = self.work
        torch.add(work.offsets, work.lengths, out=work.last)
        work.last.clamp_(min=0)  # a sequence without tokens has no last one
        torch.index_select(work.residual, 0, work.last, out=self.plan.buffers.h)
