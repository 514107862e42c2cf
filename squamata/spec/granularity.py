"""Granularity: along which axes of a tensor a scale varies.

Written in recipes as one word or a comma list of axis names::

    tensor            one scale
    channel           one per channel (weights: per output row); for the state: per head and channel
    head              one per head
    head,channel      any list of axis names of the site
    segment           one per output segment of a fused projection (z, x, B, C, dt of in_proj)
    group(128)        one per 128 neighbours along the last axis
    token             one per token; only with ``dynamic: true``
    token,group(128)  one per token and 128 channels of a product's input, if the weight has the same groups
    index             ragged: an integer map, stored beside the scale, says which scale an element uses
    index,state       ragged over the leading axes, and one scale per state index
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_GROUP = re.compile(r"group\((\d+)\)")
_AXES = ("channel", "head", "ssd_group", "state", "out", "in", "tap", "token", "index", "segment")


@dataclass(frozen=True)
class Granularity:
    """Axes along which a scale varies (``axes``), and the size of groups along the last axis (``group``)."""

    axes: tuple[str, ...] = ()
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Read the recipe form; raises ValueError for a word that is not an axis."""
        axes: list[str] = []
        group = None
        for word in (part.strip() for part in text.split(",")):
            if match := _GROUP.fullmatch(word):
                group = int(match[1])
                if group < 1:
                    raise ValueError("a group needs at least one element")
            elif word in _AXES:
                axes.append(word)
            elif word != "tensor":
                raise ValueError(f"unknown granularity '{word}': use tensor, group(N) or a list of {', '.join(_AXES)}")
        return cls(tuple(axes), group)

    def __str__(self) -> str:
        words = list(self.axes) + ([f"group({self.group})"] if self.group else [])
        return ",".join(words) or "tensor"

    @property
    def ragged(self) -> bool:
        return "index" in self.axes

    @property
    def per_tensor(self) -> bool:
        return not self.axes and self.group is None
