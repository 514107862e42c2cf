"""Plans for the compiled token: numpy arrays in, tables of addresses out.

A ``DecodePlan`` owns packed weights, scales and scratch; the states belong to the caller (``bind``). Every kind of
weight and every kind of site is a number in a record, so one compiled function serves all recipes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import prod

import numba
import numpy as np
from numpy.typing import NDArray

from squamata.kernels import landing
from squamata.kernels.decode.records import DYNAMIC, LAYER, MODEL, PRIVATE, SHARED, STATIC
from squamata.kernels.decode.rows import ROWS
from squamata.kernels.decode.token import (
    decode_token,
    function_address,
    gate_rotate_project,
    land_static,
    project_and_convolve,
    project_head,
    scan_heads,
    scan_selective,
)
from squamata.kernels.gemv import product_address
from squamata.kernels.lanes import STOCHASTIC
from squamata.kernels.memory import address
from squamata.kernels.packing import PackedLinear, allocate

Floats = NDArray[np.float32]
States = tuple[NDArray, NDArray, Floats]
ROUNDINGS = landing.ROUNDINGS | {"stochastic": STOCHASTIC}


@dataclass(frozen=True)
class SitePlan:
    """A grid: codes ``low``..``high``, static ``scale`` (1,) or (features,), or None: the scale of each row itself.

    A dynamic scale is absmax / ``span``, at least 1e-8. ``codes_only``: the value that goes on is the integer
    itself, not integer times scale (inputs of an integer convolution).
    """

    low: int
    high: int
    scale: Floats | None
    rounding: str = "half-even"
    span: float = 127.0
    codes_only: bool = False

    def expanded(self, features: int) -> tuple[Floats, Floats]:
        """Scale and reciprocal, float32 (features,)."""
        assert self.scale is not None
        scale = np.ascontiguousarray(np.broadcast_to(self.scale.astype(np.float32).reshape(-1), features))
        inverse = np.float32(1.0) / scale
        return (np.ones_like(scale) if self.codes_only else scale), inverse


@dataclass(frozen=True)
class StateSitePlan:
    """Grid of the integer state: row r uses ``table[index[r]]``; index int32 (rows,), table float32 (ids, N or 1).

    Without a table every row has its own scale, absmax / ``span``, which each update renews. Rounding *stochastic* is
    up with the fraction's probability, by noise of which ``BoundStates.reseed`` gives the seeds.
    """

    low: int
    high: int
    index: NDArray[np.int32] | None = None
    table: Floats | None = None
    rounding: str = "half-even"
    span: float = 127.0

    @property
    def dynamic(self) -> bool:
        return self.table is None


@dataclass(frozen=True)
class ConvolutionPlan:
    """float32 ``taps`` (C, K), which may be integer codes, and ``scale``, ``bias`` (C,): SiLU(sum * scale + bias).

    ``integer``: the state holds int8 codes, else float32.
    """

    taps: Floats
    scale: Floats
    bias: Floats
    integer: bool


@dataclass(frozen=True)
class RotationPlan:
    """Blocks of ``order * power`` channels times H_order (x) H_power / sqrt(order * power); matrix (order, order)."""

    size: int
    power: int
    matrix: Floats


@dataclass(frozen=True)
class LayerPlan:
    """One layer. Mamba-1 has x_proj_* and dt_proj; Mamba-2 has in_B, in_C, in_dt, heads and gate_norm.

    ``A``: negative float32, (E, N) for Mamba-1, (H,) for Mamba-2. ``dt_bias``, ``skip``: (E,) or (H,). ``sites``:
    by the names in ``spec/sites.py``; an absent name is left in float.
    """

    norm: Floats
    epsilon: float
    in_z: PackedLinear
    in_x: PackedLinear
    conv: ConvolutionPlan
    dt_bias: Floats
    A: Floats
    skip: Floats
    states: int
    out_proj: PackedLinear
    sites: dict[str, SitePlan] = field(default_factory=dict)
    state_site: StateSitePlan | None = None
    rotation: RotationPlan | None = None
    x_proj_dt: PackedLinear | None = None
    x_proj_B: PackedLinear | None = None
    x_proj_C: PackedLinear | None = None
    dt_proj: PackedLinear | None = None
    bcdt_epsilon: float | None = None
    in_B: PackedLinear | None = None
    in_C: PackedLinear | None = None
    in_dt: PackedLinear | None = None
    heads: int = 1
    groups: int = 1
    gate_norm: Floats | None = None
    gate_epsilon: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, np.inf)

    @property
    def selective(self) -> bool:
        """True for Mamba-1."""
        return self.dt_proj is not None

    @property
    def inner(self) -> int:
        return self.in_x.rows

    def state_forms(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of the convolution's state, the scan's, and the scales of its rows (see ``new_states``)."""
        channels, width = self.conv.taps.shape
        dynamic = self.state_site is not None and self.state_site.dynamic
        return [
            ((channels, width - 1), np.dtype(np.int8 if self.conv.integer else np.float32)),
            ((self.inner, self.states), np.dtype(np.int8 if self.state_site else np.float32)),
            ((self.inner if dynamic else 0,), np.dtype(np.float32)),
        ]

    def linears(self) -> Iterator[tuple[str, PackedLinear]]:
        """The projections this layer has, by field name."""
        for member in fields(self):
            value = getattr(self, member.name)
            if isinstance(value, PackedLinear):
                yield member.name, value

    def site_sizes(self) -> dict[str, int]:
        """Features of every activation site."""
        inner, states = self.inner, self.groups * self.states
        sizes = dict.fromkeys(("z", "x", "u", "y", "out"), inner)
        sizes |= dict.fromkeys(("B", "C", "B_conv", "C_conv"), states)
        low = self.x_proj_dt.rows if self.x_proj_dt else 0
        return sizes | {"in": len(self.norm), "dt_low": low, "dt": inner if self.selective else self.heads}


@dataclass(frozen=True)
class BoundStates:
    """The layers' table with the addresses of one sequence's states, which it keeps alive."""

    table: NDArray
    states: list[States]

    def reseed(self, seeds: NDArray[np.int64]) -> None:
        """New noise where the state is rounded stochastically: seeds int64 (layers,), each ``STOCHASTIC`` or more."""
        rounding = self.table["state"]["rounding"]
        rounding[:] = np.where(rounding >= STOCHASTIC, seeds, rounding)


class DecodePlan:
    """A whole model ready to decode, batch 1. ``bind`` states, then ``step`` once a token.

    ``stochastic``: a layer's state is rounded so; then ``BoundStates.reseed`` before every step.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        final_norm: Floats,
        epsilon: float,
        head: PackedLinear,
        head_site: SitePlan | None = None,
    ) -> None:
        self.layers = list(layers)
        grids = [layer.state_site for layer in self.layers if layer.state_site is not None]
        self.stochastic = any(grid.rounding == "stochastic" for grid in grids)
        self._alive: list[object] = []  # what the tables point to
        self._table = np.zeros(len(self.layers), LAYER)
        self._bound = None if self.layers else BoundStates(self._table, [])
        for record, layer in zip(self._table, self.layers, strict=True):
            self._fill_layer(record, layer)
        self._model = np.zeros(1, MODEL)
        self._model[0]["width"] = len(final_norm)
        self._model[0]["project_head"] = function_address(project_head)
        self._model[0]["final_norm"] = self._keep(final_norm)
        self._model[0]["epsilon"] = epsilon
        self._fill_linear(self._model[0]["head"], head)
        if head_site is not None:
            self._fill_site(self._model[0]["head_input"], head_site, len(final_norm))
        self._make_buffers(len(final_norm), head)

    def new_states(self) -> list[States]:
        """Zeroed states: convolution (C, K - 1) and scan (rows, N), each int8 or float32, and the rows' own scales
        float32 (rows,), none unless the scan's are dynamic."""
        made = []
        for layer in self.layers:
            conv, state, scales = (np.zeros(shape, dtype) for shape, dtype in layer.state_forms())
            made.append((conv, state, scales + 1))
        return made

    def bind(self, states: Sequence[States]) -> BoundStates:
        """Use these states from now on, in place; shapes may have leading ones, memory must be contiguous.

        Returns what ``step`` takes to come back to them. Raises ValueError for a wrong size or dtype.
        """
        for given, layer in zip(states, self.layers, strict=True):
            for have, (shape, dtype) in zip(given, layer.state_forms(), strict=True):
                if have.size != prod(shape) or have.dtype != dtype:
                    raise ValueError(f"state {have.dtype} {have.shape} where {dtype} {shape} is needed")
        table = self._table.copy()
        for record, (conv, state, scales) in zip(table, states, strict=True):
            record["conv"]["state"] = address(conv)
            record["state"]["data"] = address(state)
            if scales.size:
                record["state"]["scale"] = address(scales)
        self._bound = BoundStates(table, list(states))
        return self._bound

    def step(self, embedding: Floats, threads: int | None = None, states: BoundStates | None = None) -> Floats:
        """Embedding row float32 (D,) -> logits float32 (V,), a buffer that the next step overwrites.

        ``states``: what ``bind`` returned; the last ones bound if not given.
        """
        bound = states or self._bound
        if bound is None:
            raise ValueError("bind states before the first step")
        self._h[: len(embedding)] = embedding
        threads = min(threads or numba.get_num_threads(), len(self._privates))
        decode_token(self._model, bound.table, self._shared, self._privates, threads)
        return self._logits

    def _keep(self, array: NDArray | None, dtype: type = np.float32) -> int:
        if array is None:
            return 0
        array = np.ascontiguousarray(array, dtype)
        self._alive.append(array)
        return address(array)

    def _fill_site(self, record: np.void, site: SitePlan, features: int) -> None:
        record["low"], record["high"], record["rounding"] = site.low, site.high, ROUNDINGS[site.rounding]
        record["span"] = site.span
        if site.scale is None:
            record["mode"] = DYNAMIC
            return
        record["mode"], record["land"] = STATIC, function_address(land_static)
        scale, inverse = site.expanded(features)
        record["scale"], record["inverse"], record["value"] = self._keep(scale), self._keep(inverse), site.scale.flat[0]

    def _fill_linear(self, record: np.void, linear: PackedLinear) -> None:
        extra = linear.groups if linear.groups is not None else linear.row_sums
        self._alive.append(linear)
        record["product"] = product_address(linear.kind)
        record["kind"], record["tiles"], record["extra"] = int(linear.kind), address(linear.tiles), address(extra)
        record["scale"], record["bias"] = address(linear.scale), address(linear.bias)
        record["tile_count"], record["lines"], _ = linear.tiles.shape
        record["group_lines"], record["rows"] = linear.group_lines, linear.rows

    def _fill_layer(self, record: np.void, layer: LayerPlan) -> None:
        record["selective"], record["inner"], record["states"] = layer.selective, layer.inner, layer.states
        record["enter"], record["leave"] = function_address(project_and_convolve), function_address(gate_rotate_project)
        record["scan"] = function_address(scan_selective if layer.selective else scan_heads)
        record["width"] = len(layer.norm)
        record["low_rank"] = layer.x_proj_dt.rows if layer.x_proj_dt else 0
        record["heads"], record["groups"], record["head_dim"] = layer.heads, layer.groups, layer.inner // layer.heads
        record["norm"], record["epsilon"] = self._keep(layer.norm), layer.epsilon
        record["bcdt_epsilon"] = -1.0 if layer.bcdt_epsilon is None else layer.bcdt_epsilon
        record["gate_epsilon"], record["gate_norm"] = layer.gate_epsilon, self._keep(layer.gate_norm)
        record["dt_low_limit"], record["dt_high_limit"] = layer.dt_limit
        record["dt_bias"], record["A"], record["skip"] = map(self._keep, (layer.dt_bias, layer.A, layer.skip))
        sizes = layer.site_sizes()
        for name, site in layer.sites.items():
            self._fill_site(record["input" if name == "in" else name], site, sizes[name])
        for name, linear in layer.linears():
            self._fill_linear(record[name], linear)
        conv, target = layer.conv, record["conv"]
        target["channels"], target["width"] = conv.taps.shape
        target["integer"], target["taps"] = conv.integer, self._keep(conv.taps.T)
        target["scale"], target["bias"] = self._keep(conv.scale), self._keep(conv.bias)
        if layer.state_site is not None:
            self._fill_state(record["state"], layer.state_site, layer.states)
        if layer.rotation is not None:
            self._fill_rotation(record["rotation"], layer.rotation)

    def _fill_state(self, record: np.void, site: StateSitePlan, states: int) -> None:
        record["mode"], record["rounding"] = DYNAMIC if site.dynamic else STATIC, ROUNDINGS[site.rounding]
        record["low"], record["high"], record["span"] = site.low, site.high, site.span
        if site.table is None:
            return
        table = np.ascontiguousarray(np.broadcast_to(site.table.astype(np.float32), (len(site.table), states)))
        record["index"] = self._keep(site.index, np.int32)
        record["scale"], record["inverse"] = self._keep(table), self._keep(np.float32(1.0) / table)

    def _fill_rotation(self, record: np.void, rotation: RotationPlan) -> None:
        order = len(rotation.matrix)
        record["size"], record["order"], record["power"] = rotation.size, order, rotation.power
        record["matrix"], record["factor"] = self._keep(rotation.matrix), (order * rotation.power) ** -0.5

    def _make_buffers(self, width: int, head: PackedLinear) -> None:
        """Scratch of whole models: what threads share, and what each has alone.

        It is zeroed and longer than it need be: products read activations past their end, where weights are zero, and
        write whole tiles.
        """
        linears = [linear for layer in self.layers for _, linear in layer.linears()] + [head]
        slack = max(linear.padded_columns - linear.columns for linear in linears) + 64
        inner = max((layer.inner for layer in self.layers), default=0) + slack
        group_states = max((layer.groups * layer.states for layer in self.layers), default=0) + 64
        low_rank = max((layer.x_proj_dt.rows for layer in self.layers if layer.x_proj_dt), default=0) + slack
        sums = 2 * max(linear.tiles.shape[1] // linear.group_lines for linear in linears) + 16  # a sum, a step a group
        self._h = allocate(width + slack, np.float32)
        logits = allocate(head.padded_rows, np.float32)
        self._logits = logits[: head.rows]
        shared = dict.fromkeys(("z", "x", "u", "u_codes", "dt", "y"), inner)
        shared |= dict.fromkeys(("B", "C", "B_conv", "C_conv"), group_states)
        self._shared = self._buffers(SHARED, shared)
        self._shared[0]["h"], self._shared[0]["logits"] = address(self._h), address(logits)
        private = dict.fromkeys(("residual", "row", "codes"), width + slack)
        private |= dict.fromkeys(("low", "low_codes"), low_rank)
        private |= dict.fromkeys(("inner", "mixed", "inner_codes"), inner)
        private |= {"B": group_states, "C": group_states, "sums": sums, "state": ROWS * group_states}
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self._privates = np.concatenate([self._buffers(PRIVATE, private) for _ in range(most)])

    def _buffers(self, kind: np.dtype, lengths: dict[str, int]) -> np.ndarray:
        """One record with the addresses of new buffers of so many float32, codes included."""
        table = np.zeros(1, kind)
        for name, length in lengths.items():
            buffer = allocate(4 * length, np.uint8)
            self._alive.append(buffer)
            table[0][name] = address(buffer)
        return table
