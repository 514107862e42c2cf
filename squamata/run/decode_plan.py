"""From a model's blocks to a ``DecodePlan``: one compiled call a token on the CPU, batch 1."""

from __future__ import annotations

from operator import is_
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels import ops, packing
from squamata.kernels.causal_conv1d import factored
from squamata.kernels.decode.cpu import (
    BoundStates,
    ConvolutionPlan,
    DecodePlan,
    LayerPlan,
    RotationPlan,
    SitePlan,
    StateSitePlan,
)
from squamata.kernels.hadamard import Rotation
from squamata.kernels.lanes import STOCHASTIC
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan.chunks import ChunkSites
from squamata.kernels.threads import alone, share_threads
from squamata.models.block import Block, LayerCache, ScanCache
from squamata.models.lm import Cache, LanguageModel
from squamata.models.mamba1 import Mamba1
from squamata.models.mamba2 import Mamba2
from squamata.spec.quant import QuantSpec

DYNAMIC_SITES = ("in", "out", "head.in")
FLOATS = (torch.float32,)


class NotPlannableError(Exception):
    """The model holds something the compiled token does not know; says what."""


class _Binding(NamedTuple):
    """The cache that the decoder stepped last: ``parts``, the tensors it was made of then, and a row a sequence."""

    cache: Cache
    parts: list[Tensor]
    rows: list[BoundStates]

    def holds(self, cache: Cache) -> bool:
        """True if this is the cache and no tensor of it was replaced by another."""
        parts = _parts(cache) if cache is self.cache else []
        return cache is self.cache and len(parts) == len(self.parts) and all(map(is_, parts, self.parts))


class Decoder:
    """A plan together with the model it was made from: token ids in, logits out.

    Threads take turns: a plan has one set of buffers.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.plan = plan_model(model)
        self._bound: _Binding | None = None
        self._lock = Lock()

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One token for every sequence, ids (B,) -> logits float32 (B, V); the cache is updated in place.

        Runs on as many threads as torch has now. SquamataError for a cache of another batch, mode or model.
        """
        if ids.ndim != 1:
            raise SquamataError(f"a step takes one token id a sequence, (B,), not {tuple(ids.shape)}")
        embedded = ops.embedding(ids[:, None], self.model.embedding, torch.float32)[:, 0].numpy()
        logits = np.empty((len(ids), self.model.config.vocab_size), np.float32)  # not torch's: its threads would spin
        share_threads()
        with self._lock, alone():
            for row, states in enumerate(self._states(cache, len(ids))):
                if self.plan.stochastic:
                    states.reseed(torch.randint(STOCHASTIC, 2**62, (len(states.table),)).numpy())
                logits[row] = self.plan.step(embedded[row], states=states)
        return torch.from_numpy(logits)

    def _states(self, cache: Cache, count: int) -> list[BoundStates]:
        """The states of every sequence of a cache that should have ``count`` of them."""
        if self._bound is None or not self._bound.holds(cache):
            self._bound = _Binding(cache, _parts(cache), self._bind(cache, count))
        rows = self._bound.rows
        if count != len(rows):
            raise SquamataError(f"{count} token ids for a cache of {len(rows)} sequences: one each is needed")
        return rows

    def _bind(self, cache: Cache, batch: int) -> list[BoundStates]:
        """Every sequence's states; ``batch`` counts only for a model without layers."""
        try:
            rows = _memory(cache[0].conv).shape[0] if cache and isinstance(cache[0], ScanCache) else batch
            return [self.plan.bind([_states(layer, row) for layer in cache]) for row in range(rows)]
        except ValueError:
            message = "the cache was made in another mode or by another model: make one with model.new_cache()"
            raise SquamataError(message) from None


def plan_model(model: LanguageModel) -> DecodePlan:
    """Pack the weights of a model and lay out its scales; raises NotPlannableError.

    The packed weights are copies: the model can be dropped afterwards, its embedding excepted.
    """
    if model.dtype not in FLOATS:
        raise NotPlannableError(f"computation in {model.dtype}")
    layers = [_layer(block) for block in model.blocks]
    (head,) = _linear(model.head, model.head_site)
    head_site = _site(model.head_site, "head.in")
    return DecodePlan(layers, _floats(model.final_norm), model.config.norm_epsilon, head, head_site)


def _states(layer: LayerCache, row: int) -> tuple[NDArray, NDArray, NDArray[np.float32]]:
    """Convolution inputs, scan state, and the scales of a dynamic one, of one sequence: views of the cache.

    ValueError for what no plan reads: another kind of layer, codes carried in float.
    """
    if not isinstance(layer, ScanCache) or any(
        isinstance(value, QTensor) and value.simulated for value in (layer.conv, layer.state)
    ):
        raise ValueError("no memory of a convolution and a scan, in integers or in float")
    state = layer.state
    dynamic = isinstance(state, QTensor) and state.spec.dynamic
    scales = state.scale[row].numpy() if dynamic else np.empty(0, np.float32)  # type: ignore[union-attr]
    return _memory(layer.conv)[row], _memory(state)[row], scales


def _parts(cache: Cache) -> list[Tensor]:
    """Every tensor whose address a binding holds."""
    values = [value for layer in cache if isinstance(layer, ScanCache) for value in (layer.conv, layer.state)]
    return [
        part for value in values for part in ((value.data, value.scale) if isinstance(value, QTensor) else (value,))
    ]


def _memory(value: Value) -> NDArray:
    return (value.data if isinstance(value, QTensor) else value).numpy()


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().contiguous().numpy()


def _layer(block: Block) -> LayerPlan:
    if not isinstance(block, (Mamba1, Mamba2)):
        raise NotPlannableError(f"a layer of kind {block.kind}")
    sites = block.sites
    if "decay" in sites or "log_decay" in sites:
        raise NotPlannableError("the decay is represented in few bits")
    conv, integer_conv = _convolution(block)
    apart = ("state", *ChunkSites._fields)  # these are of chunks, which a token alone is not
    plans = {name: plan for name, site in sites.items() if name not in apart and (plan := _site(site, name))}
    if integer_conv:
        for name in ("x",) if isinstance(block, Mamba1) else ("x", "B", "C"):
            plans[name] = _site(sites[name], name, codes_only=True)  # type: ignore[assignment]
    scan = block.scan
    return LayerPlan(
        norm=_floats(block.norm),
        epsilon=block.config.norm_epsilon,
        conv=conv,
        dt_bias=_floats(scan.dt_bias),
        A=_floats(scan.A),
        skip=_floats(scan.D),
        states=block.config.d_state,
        out_proj=_linear(block.out_proj, sites["out"])[0],
        sites=plans,
        state_site=_state_site(sites["state"]),
        rotation=_rotation(block.out_rotation),
        **(_selective(block) if isinstance(block, Mamba1) else _headed(block)),
    )


def _selective(block: Mamba1) -> dict[str, Any]:
    """What only a Mamba-1 layer has."""
    sites, scan = block.sites, block.scan
    if "u_proj" in sites:
        raise NotPlannableError("x_proj reads a site of its own")
    in_x, in_z = _linear(block.in_proj, sites["in"])
    x_proj_dt, x_proj_B, x_proj_C = _linear(scan.x_proj, sites["u"])
    (dt_proj,) = _linear(scan.dt_proj, sites["dt_low"])
    projections = {"x_proj_dt": x_proj_dt, "x_proj_B": x_proj_B, "x_proj_C": x_proj_C, "dt_proj": dt_proj}
    return {"in_x": in_x, "in_z": in_z, **projections, "bcdt_epsilon": scan.bcdt_norm_epsilon}


def _headed(block: Mamba2) -> dict[str, Any]:
    """What only a Mamba-2 layer has."""
    in_z, in_x, in_B, in_C, in_dt = _linear(block.in_proj, block.sites["in"])
    layout, norm = block.scan.layout, block.gate_norm
    return {
        **{"in_x": in_x, "in_z": in_z, "in_B": in_B, "in_C": in_C, "in_dt": in_dt},
        **{"heads": layout.heads, "groups": layout.groups, "dt_limit": layout.time_step_limit},
        **{"gate_norm": _floats(norm.weight), "gate_epsilon": norm.epsilon},
    }


def _plannable_spec(site: Site) -> QuantSpec | None:
    """What lands here becomes; None for float."""
    if site.observer is not None or site.mode in ("observe", "simulate"):
        raise NotPlannableError(f"{site.name} is observed or simulated")
    spec = site.spec if site.quantized else None
    if spec is not None and not (spec.symmetric and spec.linear_grid):
        raise NotPlannableError(f"{site.name} has a zero point or a grid that is not linear")
    return spec


def _site(site: Site, name: str, codes_only: bool = False) -> SitePlan | None:
    spec = _plannable_spec(site)
    if spec is None:
        return None
    low, high = spec.code_range
    if spec.dynamic:
        if name not in DYNAMIC_SITES or spec.granularity.group or set(spec.granularity.axes) - {"token"}:
            raise NotPlannableError(f"{site.name} has a dynamic scale per {spec.granularity}")
        return SitePlan(low, high, None, spec.rounding, spec.span)
    return SitePlan(low, high, _floats(site.expanded()[0]).reshape(-1), spec.rounding, spec.span, codes_only)


def _state_site(site: Site) -> StateSitePlan | None:
    """The state's grid as rows that share scales: (rows, N) scales, equal rows stored once; or a scale a row."""
    *rows, states = site.layout.sizes
    spec = _plannable_spec(site)
    if spec is not None and spec.dynamic:
        if site.partition.kept != (*[True] * len(rows), False):
            raise NotPlannableError(f"{site.name} has a dynamic scale per {spec.granularity}")
        return StateSitePlan(*spec.code_range, rounding=spec.rounding, span=spec.span)
    plan = _site(site, "state")
    if plan is None:
        return None
    scale = site.expanded()[0].broadcast_to(site.layout.sizes).reshape(int(np.prod(rows)), states)
    table, index = np.unique(_floats(scale), axis=0, return_inverse=True)
    return StateSitePlan(plan.low, plan.high, index.reshape(-1).astype(np.int32), table, plan.rounding)


def _convolution(block: Mamba1 | Mamba2) -> tuple[ConvolutionPlan, bool]:
    """Taps and one scale a channel; integers if the cache keeps codes (see ``causal_conv1d``)."""
    state = block.new_cache(1).conv
    weight = block.scan.conv_weight
    channels = weight.shape[0]
    taps, scale = factored(weight, state) if isinstance(state, QTensor) else (as_float(weight), torch.ones(channels))
    bias = block.scan.conv_bias
    plan = ConvolutionPlan(
        taps=_floats(taps),
        scale=_floats(scale.reshape(-1).broadcast_to(channels)),
        bias=np.zeros(channels, np.float32) if bias is None else _floats(bias),
        integer=isinstance(state, QTensor),
    )
    return plan, plan.integer


def _rotation(rotation: Rotation | None) -> RotationPlan | None:
    if rotation is None:
        return None
    return RotationPlan(rotation.size, rotation.parts[1], _floats(rotation.base))


def _linear(layer: Linear, site: Site) -> list[packing.PackedLinear]:
    """One packed matrix a segment; integer activations if the input site and the weight are both quantized."""
    weight, integer = layer.weight, site.quantized
    bias = None if layer.bias is None else _floats(layer.bias)
    arguments: dict[str, Any] = {}
    if isinstance(weight, QTensor):
        if weight.second is not None or weight.simulated or not weight.spec.linear_grid:
            raise NotPlannableError(f"an asymmetric, simulated or non-linear weight that reads {site.name}")
        matrix = weight.codes().contiguous().numpy()
        group = weight.spec.granularity.group
        scale = _floats(weight.scale)
        scale = scale.reshape(len(matrix), -1) if group else np.broadcast_to(scale.reshape(-1), len(matrix))
        if group and (weight.spec.bits > 4 or group % 32):
            raise NotPlannableError(f"int{weight.spec.bits} weights in groups of {group}")
        small = weight.spec.bits <= 4
        arguments = {"integer_activations": integer}
        if small:
            arguments |= {"group": group, "sixteen_bits": layer.sixteen_bits and not integer}
        tile: Any = packing.tile_int4 if small else packing.tile_int8
    else:
        scale = None
        matrix, tile = _float_tiles(weight)
    packed, start = [], 0
    for rows in layer.rows:
        part = slice(start, start + rows)
        own_bias = None if bias is None else bias[part]
        scales = () if scale is None else (scale[part],)
        packed.append(tile(matrix[part], *scales, bias=own_bias, **arguments))
        start += rows
    return packed


def _float_tiles(weight: Tensor) -> tuple[NDArray, Any]:
    """A float matrix and how to tile it: as bfloat16 bits, half the bytes of a token, if that loses nothing."""
    values = weight.detach().float().contiguous()
    short = values.bfloat16()
    if torch.equal(short.float(), values):
        return short.view(torch.int16).numpy().view(np.uint16), packing.tile_bfloat16
    return values.numpy(), packing.tile_float32
