"""From a model's blocks to the plan of its GPU kernels: weights repacked, scales expanded, states allocated."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.conv_selective_scan import SelectiveScanLayer
from squamata.kernels.conv_ssd_scan import SSDScanLayer
from squamata.kernels.decode.triton import (
    SSD_CHANNELS,
    Buffers,
    DecodePlan,
    InputStage,
    LayerState,
    Mamba1Layer,
    Mamba2Layer,
    OutputStage,
    Projection,
    ScanParameters,
)
from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import Landing, Shape, choose_shape
from squamata.kernels.gpu.math import ROUNDINGS
from squamata.kernels.gpu.norm import RowSite, plan_rotation
from squamata.kernels.gpu.parts import PartNorms
from squamata.kernels.gpu.rows import RowRotation, plan_row_rotation
from squamata.kernels.gpu.scan import InputPlan, StatePlan
from squamata.kernels.gpu.tiles import tile_linear, weight_format
from squamata.kernels.hadamard import Rotation
from squamata.kernels.linear import Linear
from squamata.kernels.prefill.triton import FEW_SEQUENCES
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan.chunks import ChunkSites
from squamata.models.block import Block
from squamata.models.lm import LanguageModel
from squamata.models.mamba1 import Mamba1
from squamata.models.mamba2 import Mamba2


class Planner:
    """Turns a model's blocks into plans: repacks weights, expands scales, allocates states."""

    def __init__(self, batch: int, device: torch.device, bfloat16: bool, state_dtype: torch.dtype, pdl: bool) -> None:
        self.batch = batch
        self.device = device
        self.bfloat16 = bfloat16
        self.state_dtype = state_dtype
        self.pdl = pdl
        self._row_rotations: dict[tuple[Rotation | None, int], RowRotation] = {}

    def model(self, model: LanguageModel) -> DecodePlan:
        """The whole model's plan. SquamataError for what the kernels do not take."""
        for site in model.sites():
            check_site(site)
        for value in model.checkpoint.tensors.values():
            if isinstance(value, QTensor):
                check_weight(value)
        buffers = Buffers(self.batch, model.config.d_model, self.device, self.pdl)
        layers = [self.layer(block) for block in model.blocks]
        head = InputStage(
            self.floats(model.final_norm),
            model.config.norm_epsilon,
            self.projection(model.head, model.head_site, (None,), halves=True),
        )
        table, scale = model.embedding, None
        if isinstance(table, QTensor):
            scale = table.scale.to(self.device).float().reshape(-1).expand(table.shape[0]).contiguous()
            table = table.data
        elif self.bfloat16:
            table = table.to(torch.bfloat16)
        return DecodePlan(table.to(self.device).contiguous(), scale, layers, head, buffers)

    def layer(self, block: Block) -> Mamba1Layer | Mamba2Layer:
        """One layer's plan."""
        if "decay" in block.sites or "log_decay" in block.sites:
            raise SquamataError(
                "the GPU kernels keep the decay in float: leave 'mixer.decay' and 'mixer.log_decay' out"
            )
        if found := [name for name in ChunkSites._fields if name in block.sites]:
            raise SquamataError(f"the GPU kernels round nothing within a chunk: leave 'mixer.{found[0]}' out")
        if isinstance(block, Mamba2):
            return self.mamba2(block)
        if isinstance(block, Mamba1):
            return self.mamba1(block)
        raise SquamataError(f"the GPU kernels have no {block.kind} layer yet")

    def mamba2(self, block: Mamba2) -> Mamba2Layer:
        sites, config, scan = block.sites, block.config, block.scan
        names = ("z", "x", "B", "C", "dt")
        inner, channels = config.d_inner, config.d_inner + 2 * config.n_groups * config.d_state
        outputs = tuple(sites[name] for name in names)
        ring = (inner, inner + channels)
        entry = InputStage(
            self.floats(block.norm),
            config.norm_epsilon,
            self.projection(block.in_proj, sites["in"], outputs, ring, halves=True, apart=inner),
        )
        landed = [sites[name] for name in ("u", "B_conv", "C_conv")]
        conv = self.convolution(scan, list(outputs[1:4]), landed)
        shape = (self.batch, config.n_heads, config.head_dim, config.d_state)
        inputs = {"z": self.read(sites["z"]), "dt": self.read(sites["dt"])}
        return Mamba2Layer(
            entry=entry,
            z_proj=entry.projection.part(0, inner),
            scan_proj=entry.projection.part(inner, entry.projection.linear.rows),
            conv=conv,
            scan=self.scan(scan, sites["state"], inputs),
            exit=self.exit(
                block,
                block.gate_norm.weight,
                config.gate_norm_epsilon,
                config.n_groups,
                min(SSD_CHANNELS, config.head_dim),
            ),
            state=self.state(channels, config.d_conv, entry.projection, sites["state"], shape),
            starts=(0, inner + channels),
            groups=config.n_groups,
            limit=config.time_step_limit,
        )

    def mamba1(self, block: Mamba1) -> Mamba1Layer:
        sites, config, scan = block.sites, block.config, block.scan
        inner = config.d_inner
        entry = InputStage(
            self.floats(block.norm),
            config.norm_epsilon,
            self.projection(block.in_proj, sites["in"], (sites["x"], sites["z"]), (0, inner), halves=True, apart=inner),
        )
        both = [self.read(sites[name]) for name in ("B", "C")]
        if both[0].codes != both[1].codes:
            raise SquamataError("the GPU kernels want B and C both in float or both in int8")
        if "u_proj" in sites:
            raise SquamataError("the GPU kernels let x_proj read u, which this recipe represents apart from 'u_proj'")
        inputs = {name: self.read(sites[name]) for name in ("z", "dt")}
        inputs["BC"] = InputPlan(both[0].codes, torch.cat([part.scale for part in both]))
        low = (sites["dt_low"], sites["B"], sites["C"])
        norms = None
        if scan.bcdt_norm_epsilon is not None:
            width, parts = int(scan.x_proj.weight.shape[0]), (config.dt_rank, config.d_state, config.d_state)
            norms = PartNorms(scan.bcdt_norm_epsilon, parts, self.landing(scan.x_proj, low, width, (0, 0)))
        x_proj = self.projection(scan.x_proj, sites["u"], low if norms is None else (None,))
        least = 16 if entry.projection.halves else 8
        dt_proj = self.projection(scan.dt_proj, sites["dt_low"], (sites["dt"],), least_rows=least)
        shape = (self.batch, inner, config.d_state)
        inputs["u"] = InputPlan(x_proj.linear.format.integer_activations, self.read(sites["u"]).scale)
        return Mamba1Layer(
            entry=entry,
            conv_proj=entry.projection.part(0, inner),
            z_proj=entry.projection.part(inner, 2 * inner),
            conv=self.convolution(scan, [sites["x"]], [sites["u"]]),
            x_proj=x_proj,
            dt_proj=dt_proj,
            scan=self.scan(scan, sites["state"], inputs),
            exit=self.exit(block, None, 0.0, 1, dt_proj.shape.tile_rows),
            state=self.state(inner, config.d_conv, entry.projection, sites["state"], shape),
            z_start=inner,
            low_rank=config.dt_rank,
            norms=norms,
        )

    def exit(
        self, block: Mamba1 | Mamba2, gain: Tensor | None, epsilon: float, groups: int, channels: int
    ) -> OutputStage:
        """``channels``: of a program of the scan."""
        rotation = plan_rotation(block.out_rotation, block.config.d_inner, self.device)
        projection = self.projection(block.out_proj, block.sites["out"], (None,), halves=block.out_rotation is None)
        if projection.site.span > 0:
            raise SquamataError("the GPU kernels take a static scale before out_proj, not one a token")
        middle = row_site(block.sites["y"])
        gain = None if gain is None else self.floats(gain)
        rows = self.row_rotation(block.out_rotation, block.config.d_inner, int(projection.linear.format))
        alone = rotation.rotated or middle.quantized or projection.site.quantized
        alone = alone or (gain is not None and not self.norm_fits(projection, groups, channels))
        alone = alone or (projection.halves and channels not in (16, 32, 64, 128))
        return OutputStage(gain, epsilon, groups, middle, rotation, rows, projection, 0 if alone else channels)

    @staticmethod
    def norm_fits(projection: Projection, groups: int, channels: int) -> bool:
        """True if a product can apply a norm in groups to its input: each of its slices of K lies in one."""
        width = projection.linear.columns // groups
        return width % channels == 0 and projection.shape.slices % groups == 0 and groups & (groups - 1) == 0

    def row_rotation(self, rotation: Rotation | None, size: int, format: int) -> RowRotation:
        """The rotation for many rows; layers with the same one share its matrices."""
        key = (rotation, format)
        if key not in self._row_rotations:
            self._row_rotations[key] = plan_row_rotation(rotation, size, not self.bfloat16, self.device, format)
        return self._row_rotations[key]

    def scan(
        self, layer: SSDScanLayer | SelectiveScanLayer, site: Site, inputs: dict[str, InputPlan]
    ) -> ScanParameters:
        dt_bias, A, skip = (self.floats(part) for part in (layer.dt_bias, layer.A, layer.D))
        return ScanParameters(dt_bias, A, skip, self.state_grid(site), inputs)

    def floats(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).float().contiguous()

    def projection(
        self,
        layer: Linear,
        into: Site,
        out: tuple[Site | None, ...],
        ring: tuple[int, int] = (0, 0),
        halves: bool = False,
        apart: int = 0,
        least_rows: int = 8,
    ) -> Projection:
        """A product's plan: packed weight, scale of the input, and where its rows land. ``apart``: its first rows,
        which are also a product of their own. ``least_rows``: of a tile.

        ``halves``: what writes its input can leave it in 16 bits, which is fast where few sequences meet 4-bit weights.
        """
        site = row_site(into)
        quantized = isinstance(layer.weight, QTensor)
        if site.quantized and not quantized:
            raise SquamataError(
                f"{into.name} is in int8 but the weight that reads it is not: the GPU kernels want both"
            )
        halves = halves and self.bfloat16 and self.batch <= FEW_SEQUENCES
        format = weight_format(layer, site.quantized, self.bfloat16, halves)
        shape = choose_shape(int(layer.weight.shape[0]), int(layer.weight.shape[1]), format, apart, least_rows)
        if self.batch > FEW_SEQUENCES:
            shape = Shape(1, shape.slices)  # whole rows, as the products of many rows want them
        linear = tile_linear(layer, format, shape.tile_rows, self.device)
        factor = linear.factor * site.scale if site.quantized and site.span == 0 else linear.factor
        landing = None if out == (None,) else self.landing(layer, out, len(linear.factor), ring)
        return Projection(linear, factor, landing, site, shape)

    def landing(self, layer: Linear, out: tuple[Site | None, ...], padded: int, ring: tuple[int, int]) -> Landing:
        grids = [self.grid(site, rows) for site, rows in zip(out, layer.rows, strict=True)]
        columns = [torch.cat([grid[i] for grid in grids]) for i in range(4)]
        inverse, scale, low, high = (torch.nn.functional.pad(part, (0, padded - len(part))) for part in columns)
        inverse_rows = inverse[: sum(layer.rows)]
        outside = torch.cat([inverse_rows[: ring[0]], inverse_rows[ring[1] :]]) if ring[1] > ring[0] else inverse_rows
        return Landing(
            inverse,
            low,
            high,
            rounding=common_rounding(out),
            ring_start=ring[0],
            ring_stop=ring[1],
            any_codes=bool((inverse != 0).any()),
            any_values=bool((outside == 0).any()),
            ring_codes=bool((inverse_rows[ring[0] : ring[1]] != 0).any()),
            scale=scale,
        )

    def grid(self, site: Site | None, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """inverse, scale, low, high of a site, float32 (features,); inverse 0 where it stays float."""
        if site is None or not site.quantized:
            zeros = torch.zeros(features, device=self.device)
            return zeros, zeros + 1, zeros, zeros
        check_static(site)
        assert site.spec is not None
        scale, inverse, _ = site.expanded()
        low, high = (torch.full((features,), float(bound), device=self.device) for bound in site.spec.code_range)
        expanded = (part.to(self.device).reshape(-1).expand(features).contiguous() for part in (inverse, scale))
        return *expanded, low, high  # type: ignore[return-value]

    def read(self, site: Site) -> InputPlan:
        return InputPlan(site.quantized, self.grid(site, site.layout.flat_size)[1])

    def convolution(
        self, layer: SSDScanLayer | SelectiveScanLayer, inputs: list[Site], outputs: list[Site]
    ) -> ConvolutionPlan:
        if len({site.quantized for site in inputs}) > 1:
            raise SquamataError("the GPU kernels want the convolution's inputs all in float or all in int8")
        weight: Value = layer.conv_weight
        grids = [self.grid(site, site.layout.flat_size) for site in outputs]
        inverse, scale, low, high = (torch.cat(parts) for parts in zip(*grids, strict=True))
        channels = len(inverse)
        factor = torch.ones(channels, device=self.device)
        taps = as_float(weight)
        if inputs[0].quantized:
            factor = torch.cat([self.grid(site, site.layout.flat_size)[1] for site in inputs])
            if isinstance(weight, QTensor):
                taps = weight.codes()
                factor = factor * weight.element_scale().to(self.device).float().reshape(-1).expand(channels)
        bias = torch.zeros(channels) if layer.conv_bias is None else layer.conv_bias
        return ConvolutionPlan(
            self.floats(taps.T), factor, self.floats(bias), inverse, scale, low, high,
            rounding=landing_rounding(outputs[:1]),
            rounding_bc=landing_rounding(outputs[1:]),
            all_codes=bool((inverse != 0).all()),
            uniform=all(bool((grid[1] == grid[1][0]).all()) for grid in grids[1:]),
            split=len(grids[0][0]),
        )  # fmt: skip

    def state_grid(self, site: Site) -> StatePlan | None:
        if not site.quantized:
            return None
        spec, sizes = site.spec, site.layout.sizes
        assert spec is not None
        low, high = (float(bound) for bound in spec.code_range)
        rounding = ROUNDINGS[spec.rounding]
        by_row = site.partition.kept == (*(True,) * (len(sizes) - 1), False)
        if spec.dynamic and by_row:
            scale = torch.ones(self.batch * prod(sizes[:-1]), device=self.device)
            return StatePlan(scale, scale, low, high, rounding, False, spec.span)
        check_static(site)
        expanded = [part.to(self.device) for part in site.expanded()[:2] if part is not None]
        along = expanded[0].ndim == len(sizes) and expanded[0].shape[-1] > 1
        shape = sizes if along else (*sizes[:-1], 1)
        scale, inverse = (part.expand(shape).reshape(-1, shape[-1]).contiguous() for part in expanded)
        return StatePlan(scale, inverse, low, high, rounding, along)

    def state(
        self, channels: int, slots: int, projection: Projection, site: Site, shape: tuple[int, ...]
    ) -> LayerState:
        landing = projection.landing
        codes = landing is not None and landing.ring_codes
        kind = torch.int8 if codes else torch.float32
        ring = torch.zeros(slots, self.batch, channels, dtype=kind, device=self.device)
        dtype = torch.int8 if site.quantized else self.state_dtype
        return LayerState(ring, torch.zeros(shape, dtype=dtype, device=self.device))


def check_site(site: Site) -> None:
    """SquamataError for a site that a fused kernel would pass over: observed, simulated, or in a format it lacks.

    All that the kernels ask of every site; what one place asks besides is how its scale is made (``check_static``) and
    how many there are (``row_site``).
    """
    if site.observer is not None or site.mode == "observe":
        raise SquamataError(f"{site.name} is being observed, which the fused GPU kernels would not show: use the CPU")
    spec = site.spec if site.quantized else None
    if spec is None:
        return
    if site.mode == "simulate":
        raise SquamataError(f"{site.name} is simulated; the GPU kernels run integers: load the model in that mode")
    if not (spec.linear_grid and spec.symmetric):
        raise SquamataError(f"{site.name}: the GPU kernels take symmetric int8 sites only, not {spec.describe()}")
    if not spec.dynamic and site.scale is None:
        raise SquamataError(f"{site.name} has no scale: calibrate first")


def check_weight(value: QTensor) -> None:
    """SquamataError for a weight in a format that the kernels lack."""
    if value.simulated or not value.spec.linear_grid:
        raise SquamataError(f"the GPU kernels take integer weights on a linear grid, not {value.spec.describe()}")


def row_site(site: Site) -> RowSite:
    """A site whose rows have one scale each, or all the same. SquamataError for another granularity."""
    if not site.quantized:
        return RowSite()
    spec = site.spec
    assert spec is not None
    low, high = (float(bound) for bound in spec.code_range)
    rounding = ROUNDINGS[spec.rounding]
    if spec.dynamic:
        if spec.granularity.axes != ("token",):
            raise SquamataError(f"{site.name}: a dynamic scale on the GPU is one a token, not per {spec.granularity}")
        return RowSite(True, 1.0, 1.0, low, high, spec.span, rounding)
    scale, inverse, _ = site.expanded()
    if scale.numel() != 1:
        raise SquamataError(f"{site.name}: the GPU kernels take one scale here, not per {spec.granularity}")
    return RowSite(True, float(scale), float(inverse), low, high, 0.0, rounding)


def check_static(site: Site) -> None:
    """SquamataError unless the site's scale is known beforehand."""
    assert site.spec is not None
    if site.spec.dynamic:
        raise SquamataError(f"{site.name}: the GPU kernels take a static scale here, not {site.spec.describe()}")


def landing_rounding(sites: list[Site]) -> int:
    """The rounding of some sites of which any is quantized, else -1."""
    return common_rounding(tuple(sites)) if any(site.quantized for site in sites) else -1


def common_rounding(sites: tuple[Site | None, ...]) -> int:
    """The one rounding of some sites. SquamataError if they differ."""
    found: set[Any] = {site.spec.rounding for site in sites if site is not None and site.quantized and site.spec}
    if len(found) > 1:
        raise SquamataError(f"the GPU kernels want one rounding for {', '.join(site.name for site in sites if site)}")
    return ROUNDINGS[found.pop()] if found else 0
