"""What every kind of block has in common: its sites, its parameters as the kernels want them, its cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard.matrices import FAMILIES, decompose
from squamata.kernels.linear import Linear
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Mode, Site
from squamata.models.checkpoint import under
from squamata.models.config import OUTPUT_BIAS, ModelConfig, segments, site_sizes
from squamata.spec.quant import QuantSpec
from squamata.spec.sites import BLOCKS


class LayerCache(Protocol):
    """One layer's memory of the past, updated in place; what it holds is its block's business."""

    @property
    def nbytes(self) -> int: ...


@dataclass
class ScanCache:
    """The memory of a layer with a convolution and a scan: last convolution inputs, and the state."""

    conv: Value
    state: Value

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.state.nbytes


class OptionalTensor(NamedTuple):
    """A tensor that a layer may have beside its parameters. ``left_by``: what every layer has it from: the name of a
    transform or correction."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    left_by: str = ""


ROTATION = {
    "mixer.rotation": OptionalTensor((2,), torch.int64, left_by="hadamard"),
    "mixer.rotation_family": OptionalTensor((1,), torch.int64),  # whose matrices, place in FAMILIES; absent: 0, our own
}

OwnCache = TypeVar("OwnCache", bound=LayerCache)


class Block(ABC, Generic[OwnCache]):
    """One layer of the network. Subclasses read their tensors in ``__init__`` and define ``forward``.

    ``kind``: as ``ModelConfig.blocks`` names it; the shapes of its sites and tensors are in ``models/config.py``.
    ``tensors``: this layer's tensors without the ``layers.N.`` prefix. ``dtype``: of the float computation.
    ``linears``: its projections, in the order in which ``linear`` made them.
    """

    kind: str

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Value], sites: dict[str, Site], dtype: torch.dtype
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.sites = under("mixer.", sites)
        self.linears: list[Linear] = []
        self.norm = as_float(tensors["norm.weight"]).to(dtype)
        self._mixer = under("mixer.", tensors)

    @classmethod
    def site_sizes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Sizes of the feature axes of every activation and state site, by the site's name in the block."""
        return site_sizes(cls.kind, config)

    @classmethod
    def segments(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Rows of fused tensors, by what they are for: ``in_proj``, ``conv``..."""
        return segments(cls.kind, config)

    @classmethod
    def optional_tensors(cls, config: ModelConfig) -> dict[str, OptionalTensor]:
        """Tensors that a transform or correction may leave in a layer for this block to read, by name without
        ``layers.N.``."""
        if config.projection_bias:
            return {}
        return {OUTPUT_BIAS: OptionalTensor((config.d_model,), torch.float32, left_by="mean")}

    @abstractmethod
    def forward(self, h: Tensor, residual: Tensor | None, cache: OwnCache) -> tuple[Tensor, Tensor]:
        """(h, residual) float (B, L, D) -> the block's output and the residual stream before it is added."""

    @abstractmethod
    def new_cache(self, batch: int) -> OwnCache:
        """An empty cache in the storage of the sites."""

    def parameter(self, name: str) -> Tensor:
        """A small tensor, dequantized."""
        return as_float(self._mixer[name]).to(self.dtype)

    def convolution(self) -> tuple[Value, Tensor | None]:
        """Weight (C, K), codes if quantized, and bias (C,) of the convolution."""
        weight = self._mixer["conv.weight"]
        bias = self.parameter("conv.bias") if "conv.bias" in self._mixer else None
        return weight if isinstance(weight, QTensor) else weight.to(self.dtype), bias

    def linear(self, name: str) -> Linear:
        """A projection of this block."""
        weight = self._mixer[f"{name}.weight"]
        bias = self.parameter(f"{name}.bias") if f"{name}.bias" in self._mixer else None
        layer = Linear(
            weight.as_operand() if isinstance(weight, QTensor) else weight.to(self.dtype),
            bias,
            self.segments(self.config).get(name, ()),
        )
        self.linears.append(layer)
        return layer

    def rotation(self) -> Rotation | None:
        """The rotation before out_proj that a transform left here (int64: size, block); SquamataError if it is none."""
        if "rotation" not in self._mixer:
            return None
        values, inner = as_float(self._mixer["rotation"]).tolist(), self.config.d_inner
        number = int(as_float(self._mixer["rotation_family"])[0]) if "rotation_family" in self._mixer else 0
        family = FAMILIES[number] if 0 <= number < len(FAMILIES) else None
        match values:
            case [int(size), int(block)] if (
                family and size == inner and block >= 1 and size % block == 0 and decompose(block, family)
            ):
                return Rotation(size, block, family)
        raise SquamataError(
            f"tensor 'mixer.rotation' holds {values} (family {number}): expected the inner size {inner} and a block "
            f"that divides it and has a Hadamard matrix; the checkpoint is damaged, quantize the model again"
        )


def second_name(spec: QuantSpec | None) -> str:
    """Name of the second number that a site's groups have; empty if they have none."""
    return "" if spec is None else spec.second or ""


def tensor_layouts(kind: type[Block], config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
    """Layout of every tensor of a layer that may be quantized (names without ``layers.N.``)."""
    rows = kind.segments(config)
    return {
        name: Layout(info.axes, shapes[name], rows.get(name.split(".")[1], ()), flat=False)
        for name, info in BLOCKS[kind.kind].items()
        if info.kind in ("weight", "parameter") and name in shapes
    }


def make_sites(
    kind: str,
    sizes: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, QuantSpec] | None,
    site_tensors: Mapping[str, Tensor],
    mode: Mode,
    prefix: str = "",
) -> dict[str, Site]:
    """The activation and state sites of a block (names without ``layers.N.``), with their scales where known.

    Without ``specs`` all are made, even those that a recipe must ask for: specs may be given to them later.
    """
    sites = {}
    for name, info in BLOCKS[kind].items():
        if info.kind not in ("activation", "state") or (info.on_request and specs is not None and name not in specs):
            continue
        layout = Layout(info.axes, sizes[name.removeprefix("mixer.")], flat=info.kind == "activation")
        parts = under(f"{name}.", site_tensors)
        spec = (specs or {}).get(name)
        scale, second, index = (parts.get(part) for part in ("scale", second_name(spec), "index"))
        sites[name] = Site(prefix + name, layout, spec, scale, second, index, mode, order=parts.get("order"))
    return sites
