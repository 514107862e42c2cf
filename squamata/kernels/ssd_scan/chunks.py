"""Mamba-2's scan a chunk at a time with its parts at sites of their own: the 8-bit SSD of SSDi8 (arXiv 2608.21952).

Of a chunk of l tokens (section 6 of Dao and Gu 2024), with what is before it in the state s:

    scores[t, s] = C_t B_s                       lands on ``scores``, then float: times decay and dt, times u
    u_scaled_s = decay(s -> end) dt_s u_s        lands on ``u_scaled``
    new = sum_s u_scaled_s B_s                   lands on ``state``
    y_t = sum_s scores ... + decay(start -> t) C_t state
    state = floor(state decay(start -> end) + 1/2) + new, in codes of ``state``; the decay lands on ``chunk_decay``

A product of two sites with codes is one of integers. The last line is SSDi8's ``((s32 * gate + 64) >> 7) + new`` where
``chunk_decay`` is fixed-point in 7 bits: s32 goes on unclamped from chunk to chunk, what C reads and what the cache
keeps is clamped to the codes. A state whose scale is not known beforehand is rounded once a chunk instead.

One token alone is the recurrence of ``ssd_scan``, whose state lands after it: SSDi8's code does not decode, and chunks
of one token lose much: a gate of 7 bits forgets what slow heads hold, what a token adds to a state is less than a code,
and ``u_scaled`` was seen decayed until the ends of chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from squamata.kernels.decay import DecaySites
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site, working
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan.ref import decays


class Factor(NamedTuple):
    """``numbers`` (..., sizes of a site) times ``scale`` (sizes, or 1 for a last axis of state indices).

    Codes where the site's are integers that share a scale along what is summed over, else the values and ones.
    """

    numbers: Tensor
    scale: Tensor

    @classmethod
    def of(cls, value: Value, site: Site, dtype: torch.dtype) -> Factor:
        layout, lead = site.layout, value.shape[:-1] if site.layout.flat else value.shape[:1]
        over_states = layout.axes[-1] == "state"
        shape = (*layout.sizes[:-1], 1) if over_states else layout.sizes
        if not isinstance(value, QTensor) or not _shared(value, site):
            numbers = as_float(value, dtype)
            return cls(numbers.reshape(*lead, *layout.sizes), numbers.new_ones(shape))
        scale = value.scale.to(dtype)
        if layout.flat:
            scale = scale.expand(layout.flat_size).reshape(layout.sizes)
            scale = scale[..., :1] if over_states else scale
        return cls(value.codes().to(dtype).reshape(*lead, *layout.sizes), scale.expand(shape))


def _shared(value: QTensor, site: Site) -> bool:
    """True if codes may be summed: a linear grid whose scale does not vary along tokens or state indices."""
    spec = value.spec
    if not spec.linear_grid or spec.dynamic or spec.granularity.group or spec.granularity.ragged:
        return False
    return site.layout.axes[-1] != "state" or not site.partition.kept[-1]


class ChunkSites(NamedTuple):
    """Where the parts of a chunk land; None where nothing happens."""

    scores: Site | None
    u_scaled: Site | None
    chunk_decay: Site | None

    @classmethod
    def of(cls, sites: Mapping[str, Site]) -> ChunkSites | None:
        """Those of a layer's sites that round or observe something; None if none does."""
        found = working(sites, cls._fields)
        return cls(*found) if any(found) else None

    def scan(
        self, u: Value, dt: Value, B: Value, C: Value, state: Value,
        parameters: tuple[Tensor, Tensor, Tensor], layout: HeadLayout, sites: Mapping[str, Site],
    ) -> tuple[Tensor, Value]:  # fmt: skip
        """The contract of ``ssd_scan`` with these sites; ``parameters``: A, D, dt_bias. Gives the state as landed.

        Chunks begin where the call does.
        """
        A, D, dt_bias = parameters
        steps = softplus(as_float(dt, A.dtype) + dt_bias).clamp(*layout.time_step_limit)  # (B, L, H)
        rounded = DecaySites.of(sites)
        exponent = steps * A if rounded is None else rounded.logarithm(steps, A)
        x = as_float(u, A.dtype).unflatten(2, (layout.heads, layout.head_dim))
        running = Running(sites["state"], state, A.dtype)
        sides = Factor.of(B, sites["B_conv"], A.dtype), Factor.of(C, sites["C_conv"], A.dtype)
        ys = []
        for start in range(0, x.shape[1], layout.chunk):
            span = slice(start, start + layout.chunk)
            B_, C_ = (side._replace(numbers=side.numbers[:, span]) for side in sides)
            ys.append(self._chunk(x[:, span], steps[:, span], exponent[:, span], B_, C_, running))
        y = torch.cat(ys, dim=1) + D[:, None] * x
        return y.flatten(2), running.landed

    def _chunk(self, u: Tensor, dt: Tensor, exponent: Tensor, B: Factor, C: Factor, running: Running) -> Tensor:
        """y (B, l, H, P) of one chunk; ``running`` moves on to its end."""
        groups = B.numbers.shape[2], u.shape[2] // B.numbers.shape[2]  # (G, r): H = G r
        log_decay, between = decays(exponent, u.dtype)  # (B, H, l), (B, H, t, s)
        weighted = u * dt[..., None]  # (B, l, H, P)
        scores = self._scores(B, C).repeat_interleave(groups[1], dim=1)
        inside = torch.einsum("bhts,bshp->bthp", scores * between, weighted)
        state = running.factor
        before = _product("btgn,bgrpn->btgrp", C.numbers, state.numbers.unflatten(1, groups)).flatten(2, 3)
        before = before * (C.scale.repeat_interleave(groups[1], dim=0) * state.scale[..., 0])
        y = inside + torch.exp(log_decay).to(u.dtype).transpose(1, 2)[..., None] * before
        scaled = self._scaled(torch.exp(log_decay[..., -1:] - log_decay).to(u.dtype).transpose(1, 2), weighted)
        added = _product("bsgrp,bsgn->bgrpn", scaled.numbers.unflatten(2, groups), B.numbers).flatten(1, 2)
        added = added * (scaled.scale * B.scale.repeat_interleave(groups[1], dim=0))[..., None]
        gate = torch.exp(log_decay[..., -1]).to(u.dtype)
        gate = gate if self.chunk_decay is None else as_float(self.chunk_decay.land(gate), gate.dtype)
        running.advance(gate, added)
        return y

    def _scores(self, B: Factor, C: Factor) -> Tensor:
        """C_t B_s as the site represents it, (B, G, t, s); only for s <= t, else 0."""
        products = _product("btgn,bsgn->btsg", C.numbers, B.numbers) * (C.scale * B.scale)[:, 0]
        if self.scores is None:
            return products.permute(0, 3, 1, 2)
        t, s = torch.tril_indices(*products.shape[1:3], device=products.device)
        landed = torch.zeros_like(products)
        landed[:, t, s] = as_float(self.scores.land(products[:, t, s]), products.dtype)
        return landed.permute(0, 3, 1, 2)

    def _scaled(self, to_end: Tensor, weighted: Tensor) -> Factor:
        """u times dt and the decay until the chunk's end, as the site represents it: (B, l, H, P)."""
        scaled = to_end[..., None] * weighted
        if self.u_scaled is None:
            return Factor(scaled, scaled.new_ones(scaled.shape[2:]))
        return Factor.of(self.u_scaled.land(scaled.flatten(2)), self.u_scaled, scaled.dtype)


class Running:
    """The state from chunk to chunk: codes wider than the site's if its scale is known beforehand, else values.

    ``landed``: as the site keeps it. ``factor``: that, as a product takes it.
    """

    def __init__(self, site: Site, state: Value, dtype: torch.dtype) -> None:
        spec = site.spec
        self.site, self.dtype, self.landed = site, dtype, state
        self.integer = site.quantized and spec is not None and not spec.dynamic and spec.linear_grid and spec.symmetric
        self.wide = state.codes().double() if self.integer and isinstance(state, QTensor) else as_float(state, dtype)

    @property
    def factor(self) -> Factor:
        return Factor.of(self.landed, self.site, self.dtype)

    def advance(self, gate: Tensor, added: Tensor) -> None:
        """To the end of a chunk whose decay is ``gate`` (B, H) and whose tokens add (B, H, P, N)."""
        if not self.integer:
            self.wide = gate[..., None, None] * self.wide + added
            self.landed = self.site.land(self.wide)
            self.wide = as_float(self.landed, self.dtype)
            return
        new = self.site.land(added)
        assert isinstance(new, QTensor)
        decayed = self.wide * gate[..., None, None].double()
        self.wide = decayed + (torch.floor(decayed + 0.5) - decayed).detach() + new.codes().double()
        self.landed = replace(new, data=self.wide.clamp(*new.spec.code_range).to(new.data.dtype))


def _product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """In float64, which holds every sum of integers; rounded once."""
    return torch.einsum(equation, a.double(), b.double()).to(a.dtype)
