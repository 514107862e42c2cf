"""Site: one named edge of the network, and what happens to a tensor that lands on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.codec import CODECS, Grid, range_to_scale
from squamata.kernels.packing import pack_flagged
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.spec.quant import QuantSpec

Mode = Literal["float", "observe", "simulate", "integer"]

_MEANING = frozenset(("layout", "spec", "scale", "second", "index", "order", "mode", "observer"))


@dataclass
class Revision:
    """How often the sites that share it have changed: whoever has compiled them compares the number."""

    number: int = 0


@dataclass
class Site:
    """Where a tensor may be represented in few bits; producer and consumer share one.

    ``mode`` decides what landing does: *float* and *observe*: identity; *simulate*: rounded, integers carried in
    float (differentiable: straight-through); *integer*: rounded to int8 (int16 where the codec's codes need it).
    Without a spec every mode is the identity.
    ``observer`` sees the tensor before that, in every mode; while there is one, no kernel lands here by itself.
    ``scale``, ``second`` (the codec's second number a group): stored form (``partition.shape()``), float32.
    ``order``: int64 (features,), the channels in the order in which they fill the groups of a spec that keeps some.
    ``revision`` grows with every change to one of these.
    """

    name: str
    layout: Layout
    spec: QuantSpec | None = None
    scale: Tensor | None = None
    second: Tensor | None = None
    index: Tensor | None = None
    mode: Mode = "float"
    observer: Callable[[Tensor], None] | None = None
    order: Tensor | None = None
    _expanded: Grid | None = field(default=None, repr=False)
    revision: Revision = field(default_factory=Revision, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        changed = name in _MEANING and "revision" in self.__dict__ and self.__dict__[name] is not value
        object.__setattr__(self, name, value)
        if changed:
            self._expanded = None
            self.revision.number += 1

    @property
    def partition(self) -> Partition:
        assert self.spec is not None
        return Partition(self.spec.granularity, self.layout, self.index)

    @property
    def quantized(self) -> bool:
        """True if a tensor that lands here leaves as a QTensor."""
        return self.spec is not None and self.mode in ("simulate", "integer")

    @property
    def static(self) -> bool:
        """True if a tensor that lands here becomes int8 with a scale known beforehand: what kernels may fuse."""
        spec = self.spec if self.mode == "integer" and self.observer is None else None
        return spec is not None and not spec.dynamic and spec.symmetric and spec.linear_grid

    def set_scale(self, scale: Tensor, second: Tensor | None = None) -> None:
        """Give the site its calibrated scale and second number, stored form."""
        self.scale, self.second, self._expanded = scale, second, None
        self.revision.number += 1  # it may be the same tensor with other numbers

    def expanded(self) -> Grid:
        """The numbers of every group, broadcastable against the features."""
        if self._expanded is None:
            self._expanded = self._expand()
        return self._expanded

    @torch.inference_mode(False)  # what is kept must serve whoever wants gradients, too
    def _expand(self) -> Grid:
        if self.scale is None:
            raise ValueError(f"{self.name} has no scale: calibrate first")
        scale = self.partition.expand(self.scale.float()).contiguous()
        return Grid.of(scale, None if self.second is None else self.partition.expand(self.second.float()))

    def land(self, x: Tensor) -> Value:
        """What the tensor (..., features) becomes here."""
        if self.observer is not None:
            self.observer(x)
        if not self.quantized:
            return x
        assert self.spec is not None
        if self.spec.keep is not None and self.spec.keep.above is not None:
            return self._land_beside_float(x, self.spec.keep.above)
        if self.layout.flat and self.spec.dynamic and self.spec.granularity.group is not None:
            return self._land_in_groups(x)
        stored = encode(x, self.grid(x), self.spec, carry_float=self.mode == "simulate")
        if self.layout.flat and self.spec.flagged and not stored.simulated:
            return replace(stored, data=pack_flagged(stored.data), length=x.shape[-1])
        return stored

    def _land_in_groups(self, x: Tensor) -> QTensor:
        """A scale for every token and group of channels, in ``order`` if the spec keeps some; scales (..., groups)."""
        assert self.spec is not None
        spec, kept = self.spec, self.spec.kept_channels
        if kept and self.order is None:
            raise SquamataError(f"{self.name} keeps {kept} channels: add the transform 'sort_inputs', which says which")
        x = x.float() if self.order is None else x.float()[..., self.order]
        sizes = spec.group_sizes(x.shape[-1])
        specs = [spec.of_rest] * (len(sizes) - (kept > 0)) + ([spec.of_kept] if kept else [])
        parts = []
        for part, own in zip(x.split(sizes, dim=-1), specs, strict=True):
            scale, second = range_to_scale(part.amin(-1, keepdim=True), part.amax(-1, keepdim=True), own)
            parts.append(encode(part, Grid.of(scale, second), own, carry_float=self.mode == "simulate"))
        codes = torch.cat([part.data for part in parts], dim=-1)
        scales = torch.cat([part.scale for part in parts], dim=-1)
        seconds = [part.second for part in parts if part.second is not None]
        return QTensor(codes, scales, spec, torch.cat(seconds, dim=-1) if seconds else None, order=self.order)

    def _land_beside_float(self, x: Tensor, above: float) -> QTensor:
        """Channels in which a token reaches ``above`` stay float; a token's scale is that of its smaller values, those
        of these channels included, as in bitsandbytes.
        """
        assert self.spec is not None
        x = x.float()
        outlying = x.abs() >= above
        channels = outlying.flatten(0, -2).any(0)
        grid = self.grid(x.masked_fill(outlying, 0.0))
        stored = encode(x.masked_fill(channels, 0.0), grid, self.spec, carry_float=self.mode == "simulate")
        return replace(stored, kept=x.masked_fill(~channels, 0.0))

    def grid(self, x: Tensor) -> Grid:
        """The numbers by which a tensor that lands here is rounded, what is taken from the tensor itself included."""
        assert self.spec is not None
        grid = self.runtime_grid(x) if self.spec.dynamic else self.expanded()
        live = CODECS[self.spec.codec].live
        return grid if live is None else live(x, grid, self.spec)

    def runtime_grid(self, x: Tensor) -> Grid:
        """Scale taken from the tensor itself, broadcastable against it.

        A state keeps its sequences apart; an activation its tokens if the granularity says ``token``, else one scale
        serves all tokens of the call.
        """
        assert self.spec is not None
        sizes, kept = self.layout.sizes, self.partition.kept
        lead = x.ndim - (1 if self.layout.flat else len(sizes))
        features = x.reshape(*x.shape[:lead], *sizes)
        apart = not self.layout.flat or "token" in self.spec.granularity.axes
        reduced = [] if apart else list(range(lead))
        reduced += [lead + axis for axis, keep in enumerate(kept) if not keep]
        low, high = (features.amin(reduced, True), features.amax(reduced, True)) if reduced else (features, features)
        scale, second = range_to_scale(low, high, self.spec)
        if self.layout.flat:
            scale, second = self._flatten(scale, lead), None if second is None else self._flatten(second, lead)
        return Grid.of(scale, second)

    def _flatten(self, part: Tensor, lead: int) -> Tensor:
        """(leading, ...sizes or 1s) -> (leading, 1 or features)."""
        if not any(self.partition.kept):
            return part.flatten(lead)
        return part.expand(*part.shape[:lead], *self.layout.sizes).flatten(lead)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Value:
        """Zeros of this shape in the site's own storage: how caches are made."""
        if not self.quantized:
            return torch.zeros(shape, dtype=dtype)
        assert self.spec is not None
        carrier = torch.zeros(shape, dtype=integer_type(self.spec) if self.mode == "integer" else torch.float32)
        if self.spec.dynamic:
            scale = torch.ones_like(self.runtime_grid(carrier.float()).scale)
            return QTensor(carrier, scale, self.spec, None if self.spec.second is None else torch.zeros_like(scale))
        scale, _, second = self.expanded()
        if second is not None and self.spec.second == "zero":
            carrier += second.to(carrier.dtype)
        return QTensor(carrier, scale, self.spec, second)


def observed(value: object) -> bool:
    """True if the value is a site with an observer, or a mapping or sequence with such a site in it."""
    if isinstance(value, Site):
        return value.observer is not None
    if isinstance(value, Mapping):
        return any(map(observed, value.values()))
    return isinstance(value, list | tuple) and any(map(observed, value))


def working(sites: Mapping[str, Site], names: Iterable[str]) -> list[Site | None]:
    """The sites of these names that round or observe something; None for each of the others."""
    wanted = [sites.get(name) for name in names]
    return [site if site is not None and (site.quantized or site.observer is not None) else None for site in wanted]


@contextmanager
def observing(sites: Iterable[Site], callback: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Within the block ``callback(site, tensor)`` sees every tensor that lands on these sites, before it is rounded.

    The observers that were there before do not see them, and are put back afterwards.
    """
    before = [(site, site.observer) for site in sites]
    try:
        for site, _ in before:
            site.observer = partial(callback, site)
        yield
    finally:
        for site, observer in before:
            site.observer = observer


def integer_type(spec: QuantSpec) -> torch.dtype:
    """In which codes are held where nothing is packed."""
    return torch.int8 if spec.carrier == "int8" else torch.int16


def encode(x: Tensor, grid: Grid, spec: QuantSpec, carry_float: bool = False) -> QTensor:
    """Round to the grid of the spec's codec, as integers or carried in float."""
    codes = CODECS[spec.codec].encode(x, grid, spec)
    return QTensor(codes if carry_float else codes.to(integer_type(spec)), grid.scale, spec, grid.second)
