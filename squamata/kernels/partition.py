"""Partition: granularity settled once, by one reshape or one index map, before anything else sees the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.spec.granularity import Granularity


@dataclass(frozen=True)
class Layout:
    """Feature axes of a tensor (those after batch and length) with their sizes; ``segments`` split ``out``.

    ``flat``: the features arrive as one axis (activations), so expanded scales are flattened too.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    segments: tuple[int, ...] = ()
    flat: bool = True

    @property
    def flat_size(self) -> int:
        return prod(self.sizes)

    def of_rows(self, count: int) -> Layout:
        """The layout of so many of the rows alone; segments are not theirs any more."""
        return replace(self, sizes=(count, *self.sizes[1:]), segments=())

    def segment_index(self) -> Tensor:
        """Segment number of every row, int64 (out,)."""
        sizes = self.segments or (self.sizes[0],)
        return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@dataclass(frozen=True)
class Partition:
    """How the features of one site fall into groups that share a scale.

    ``split`` gives the members of every group to a scale strategy; ``expand`` turns one number a group into a
    tensor that broadcasts against the features. Ragged partitions need ``index``, an int64 tensor over the leading
    axes.
    """

    granularity: Granularity
    layout: Layout
    index: Tensor | None = None

    @property
    def kept(self) -> tuple[bool, ...]:
        """For every feature axis: does the scale vary along it?"""
        axes = self.granularity.axes
        if self.layout.axes[0] == "out":  # a weight: 'channel' means an output row
            return ("out" in axes or "channel" in axes, False)
        every = "channel" in axes
        return tuple(axis in axes or (every and axis not in ("state", "tap")) for axis in self.layout.axes)

    @property
    def row_by_row(self) -> bool:
        """True if no two rows (entries of the first of several axes) share a scale: they can be dealt with apart."""
        apart = bool(self.granularity.group) or self.kept[0]
        return len(self.layout.sizes) > 1 and apart and "segment" not in self.granularity.axes

    @property
    def _index(self) -> Tensor | None:
        if self.granularity.ragged and self.index is None:
            raise SquamataError(f"granularity '{self.granularity}' needs an index map: add the transform 'reorder'")
        return self.layout.segment_index() if "segment" in self.granularity.axes else self.index

    @cached_property
    def _places(self) -> tuple[Tensor, ...]:
        """For every value of the index, where it is in the flattened leading axes: int64 (members,), rising."""
        assert self._index is not None
        flat = self._index.flatten()
        return torch.argsort(flat, stable=True).split(torch.bincount(flat).tolist())

    def shape(self) -> tuple[int, ...]:
        """Shape in which scales of this partition are stored."""
        if (index := self._index) is not None:
            trailing = zip(self.layout.sizes[index.ndim :], self._trailing(index), strict=True)
            return (len(self._places), *(size for size, keep in trailing if keep))
        kept = tuple(size for size, keep in zip(self.layout.sizes, self.kept, strict=True) if keep)
        if self.granularity.group:
            rows = prod(self.layout.sizes[:-1])
            return (rows, -(-self.layout.sizes[-1] // self.granularity.group))
        return kept

    def _trailing(self, index: Tensor) -> tuple[bool, ...]:
        return tuple(axis in self.granularity.axes for axis in self.layout.axes[index.ndim :])

    def split(self, x: Tensor) -> list[Tensor]:
        """Members of every group: tensors (groups, members) that, concatenated, follow ``shape()`` flattened.

        ``x``: (observations, ...features). A ragged partition gives one tensor an index value; a last group that is
        not full is filled with its own members again, which changes no extreme and hardly a quantile.
        """
        return [part[0] for part in self.split_apart(x[None])]

    def split_apart(self, x: Tensor) -> list[Tensor]:
        """The same of every sample by itself: (samples, observations, ...features) -> (samples, groups, members)."""
        samples = len(x)
        x = x.reshape(samples, -1, *self.layout.sizes)
        if (index := self._index) is not None:
            return self._split_ragged(x, index)
        if group := self.granularity.group:
            x = x.reshape(*x.shape[:2], -1, self.layout.sizes[-1])
            if tail := x.shape[-1] % group:
                repeated = x[..., -tail:].repeat(1, 1, 1, -(-group // tail))
                x = torch.cat([x, repeated[..., : group - tail]], dim=-1)
            return [x.unflatten(-1, (-1, group)).permute(0, 2, 3, 1, 4).reshape(samples, -1, x.shape[1] * group)]
        kept = [axis + 2 for axis, keep in enumerate(self.kept) if keep]
        rest = [1] + [axis + 2 for axis, keep in enumerate(self.kept) if not keep]
        return [x.permute(0, *kept, *rest).reshape(samples, prod(x.shape[axis] for axis in kept), -1)]

    def _split_ragged(self, x: Tensor, index: Tensor) -> list[Tensor]:
        kept = [axis + 3 for axis, keep in enumerate(self._trailing(index)) if keep]
        x = x.flatten(2, 1 + index.ndim)  # (samples, observations, features with an index, ...trailing)
        rest = [axis for axis in range(1, x.ndim) if axis not in kept]
        parts = []
        for places in self._places:
            members = x.index_select(2, places)
            groups = prod(members.shape[axis] for axis in kept)
            parts.append(members.permute(0, *kept, *rest).reshape(len(x), groups, -1))
        return parts

    def expand(self, values: Tensor) -> Tensor:
        """One number a group, ``shape()`` -> a tensor that broadcasts against the features.

        Groups along the last axis of a weight stay (out, in / group): products apply them group by group.
        """
        if self.granularity.per_tensor or (self.granularity.group and self.layout.axes[0] == "out"):
            return values
        if (index := self._index) is not None:
            expanded = values[index]
            expanded = expanded.reshape(*expanded.shape, *(1,) * (len(self.layout.sizes) - expanded.ndim))
        elif group := self.granularity.group:
            expanded = values.repeat_interleave(group, dim=-1)[:, : self.layout.sizes[-1]].reshape(self.layout.sizes)
        else:
            sizes = [size if keep else 1 for size, keep in zip(self.layout.sizes, self.kept, strict=True)]
            expanded = values.reshape(sizes)
        if not self.layout.flat:
            return expanded
        return expanded.broadcast_to(self.layout.sizes).reshape(-1)


def gather(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Per-group numbers of ``split`` parts -> the stored shape."""
    return torch.cat([part.reshape(-1) for part in parts]).reshape(shape)
