"""Counts: how many elements and how many scales every tensor and site of a model has under a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from squamata.errors import SquamataError
from squamata.models.config import OUTPUT_BIAS, ModelConfig, parameter_shapes, segments, site_sizes
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe
from squamata.spec.sites import SiteInfo, all_sites

ZERO_BITS = 8  # of the zero point beside every scale of an asymmetric format
SPARSE_BITS, POINTER_BITS = 32, 32  # of an element in a sparse part (float16 and its column), and of where a row begins


@dataclass(frozen=True)
class Groups:
    """Ragged groups of Quamba2: each of the ``ssd`` groups of heads falls into ``heads`` groups by likeness, and the
    channels of these into ``channels`` groups (arXiv 2503.22879, section 4.1)."""

    ssd: int
    heads: int
    channels: int

    @property
    def count(self) -> int:
        return self.ssd * self.heads * self.channels

    @property
    def ranges(self) -> int:
        """Ends that must be stored: of every head group, and of every channel group within it."""
        return self.ssd * self.heads + self.count


@dataclass(frozen=True)
class Count:
    """One tensor or site. ``spec`` None: left in float, ``float_bits`` wide. ``scales``: numbers that are stored."""

    name: str
    info: SiteInfo | None
    sizes: tuple[int, ...]
    spec: QuantSpec | None
    scales: int
    float_bits: int

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    @property
    def bits(self) -> int:
        """Of one element."""
        return self.spec.bits if self.spec else self.float_bits

    @property
    def scale_bits(self) -> int:
        """Of one scale, with the second number that its format may have beside it."""
        if self.spec is None:
            return 0
        second = 0 if self.spec.second is None else ZERO_BITS if self.spec.second == "zero" else 32
        return (16 if self.spec.scale_dtype == "float16" else 32) + second

    @property
    def scale_bytes(self) -> float:
        return self.scales * self.scale_bits / 8

    @property
    def data_bytes(self) -> float:
        """Of the codes; so many channels as the recipe keeps in more bits are counted with these."""
        total = self.elements * self.bits
        if self.spec is not None and self.spec.kept_channels:
            kept = min(self.spec.kept_channels, self.sizes[-1]) * prod(self.sizes[:-1])
            total += kept * (self.spec.widest - self.bits)
        return total / 8 + self.sparse_bytes

    @property
    def sparse_bytes(self) -> float:
        """Of a weight's sparse part, of about as many elements as the spec says."""
        share = self.spec.sparse if self.spec else 0.0
        return (self.elements * share * SPARSE_BITS + (self.sizes[0] + 1) * POINTER_BITS) / 8 if share else 0.0


def ragged_groups(
    config: ModelConfig, recipe: Recipe, ssd: int | None = None, heads: int | None = None, channels: int | None = None
) -> Groups:
    """As given, else as the recipe's ``reorder`` transform asks for (``reorder_within``: at most), else 4 x 4; never
    more groups than members."""
    asked: dict[str, Any] = {"head_groups": 4, "channel_groups": 4}
    for named in recipe.transforms:
        if named.name in ("reorder", "reorder_within"):
            most = 4 if named.name == "reorder" else 16
            asked = {"head_groups": most, "channel_groups": most} | named.parameters
    ssd, heads, channels = ssd or config.n_groups, heads or asked["head_groups"], channels or asked["channel_groups"]
    if min(ssd, heads, channels) < 1:
        raise SquamataError(f"groups {ssd} x {heads} x {channels}: give at least 1 of each")
    members = max(1, config.n_heads // ssd), config.head_dim or config.d_inner
    return Groups(ssd, min(heads, members[0]), min(channels, members[1]))


def counts(config: ModelConfig, recipe: Recipe, groups: Groups, float_bits: int) -> dict[str, Count]:
    """Every tensor and every site by name; a tied head is listed too, since its product reads it."""
    specs, infos = recipe.resolve(config.blocks), all_sites(config.blocks)
    shapes: dict[str, tuple[int, ...]] = {"head.in": (config.d_model,)}
    shapes |= parameter_shapes(config) | {"head.weight": (config.vocab_size, config.d_model)}
    for layer, kind in enumerate(config.blocks):
        shapes |= {f"layers.{layer}.mixer.{name}": sizes for name, sizes in site_sizes(kind, config).items()}
        shapes |= {f"layers.{layer}.{OUTPUT_BIAS}": (config.d_model,)} if recipe.correct else {}
    found = {}
    for name, sizes in shapes.items():
        info, spec, scales = infos.get(name), specs.get(name), 0
        if info and info.on_request and spec is None:
            continue
        if info and spec:
            grouped = (groups.ssd, *sizes[1:]) if info.axes[0] == "ssd_group" else sizes
            scales = scale_count(spec, info.axes, grouped, _fused(name, config), groups.count)
        found[name] = Count(name, info, sizes, spec, scales, float_bits)
    return found


def _fused(name: str, config: ModelConfig) -> int:
    """Segments of a tensor: of a fused projection's weight, or of the convolution."""
    if not name.startswith("layers."):
        return 1
    _, layer, _, part, *_ = name.split(".")
    return len(segments(config.blocks[int(layer)], config).get(part, (1,)))


def scale_count(spec: QuantSpec, axes: tuple[str, ...], sizes: tuple[int, ...], fused: int, ragged: int) -> int:
    """Numbers that a granularity stores for a tensor; the same rule as ``kernels.partition``, without the tensor.

    ``fused``: segments of a fused tensor; ``ragged``: groups of an index map.
    """
    words = spec.granularity.axes
    if "segment" in words or spec.granularity.ragged:
        own = fused if "segment" in words else ragged
        return own * prod(size for axis, size in zip(axes, sizes, strict=True) if axis in words)
    if spec.granularity.group:
        return prod(sizes[:-1]) * len(spec.group_sizes(sizes[-1]))
    if axes[0] == "out":
        return sizes[0] * spec.numbers if {"out", "channel"} & set(words) else 1
    every = "channel" in words
    kept = [axis in words or (every and axis not in ("state", "tap")) for axis in axes]
    return prod(size for size, keep in zip(sizes, kept, strict=True) if keep)
