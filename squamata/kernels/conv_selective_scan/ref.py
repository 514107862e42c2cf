"""Composition of the fine ops: the definition a fused kernel is tested against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from squamata.kernels.causal_conv1d import causal_conv1d
from squamata.kernels.conv_selective_scan import SelectiveScanLayer
from squamata.kernels.decay import DecaySites
from squamata.kernels.linear import linear
from squamata.kernels.qtensor import QTensor, Value, as_float, recalled, store
from squamata.kernels.rms_norm.ref import normalize
from squamata.kernels.selective_scan import ref as reference
from squamata.kernels.selective_scan import selective_scan
from squamata.kernels.site import Site

OBSERVED_EVERY = 64  # tokens between two looks at the state while observing


def run(x: Value, z: Value, layer: SelectiveScanLayer, conv: Value, state: Value, sites: Mapping[str, Site]) -> Value:
    u, projected = _convolved(x, layer, conv, sites)
    if layer.bcdt_norm_epsilon is None:
        dt_low, B, C = linear(projected, layer.x_proj, (sites["dt_low"], sites["B"], sites["C"]))
    else:
        parts = linear(projected, layer.x_proj, (None, None, None))
        normed = (normalize(as_float(part), layer.bcdt_norm_epsilon) for part in parts)
        dt_low, B, C = (sites[name].land(part) for name, part in zip(("dt_low", "B", "C"), normed, strict=True))
    (dt,) = linear(dt_low, layer.dt_proj, (sites["dt"],))
    decay = DecaySites.of(sites)
    scan = selective_scan if decay is None else partial(reference.run, sites=decay)
    running = recalled(state, layer.A.dtype)
    length = u.shape[1]
    span = OBSERVED_EVERY if sites["state"].mode == "observe" else length
    ys = []
    for start in range(0, length, span):
        u_, dt_, B_, C_, z_ = (tokens(value, start, start + span) for value in (u, dt, B, C, z))
        y, running = scan(u_, dt_, layer.A, B_, C_, layer.D, z_, layer.dt_bias, running, sites["y"])
        landed = sites["state"].land(running)
        ys.append(y)
    store(state, landed)
    return ys[0] if len(ys) == 1 else torch.cat([as_float(y, layer.A.dtype) for y in ys], dim=1)


def _convolved(x: Value, layer: SelectiveScanLayer, conv: Value, sites: Mapping[str, Site]) -> tuple[Value, Value]:
    """u as the scan reads it and as x_proj does: one value, unless the recipe represents ``u_proj`` apart."""
    site, apart = sites["u"], sites.get("u_proj")
    if apart is None or apart.spec is None:
        (u,) = causal_conv1d((x,), layer.conv_weight, layer.conv_bias, conv, (site,))
        return u, u
    (raw,) = causal_conv1d((x,), layer.conv_weight, layer.conv_bias, conv, (Site("", site.layout),))
    assert not isinstance(raw, QTensor)
    return site.land(raw), apart.land(raw)


def tokens(value: Value, start: int, stop: int) -> Value:
    """Tokens start..stop of a value (B, L, C)."""
    if not isinstance(value, QTensor):
        return value[:, start:stop]
    scale, second, kept = (
        part[:, start:stop] if part is not None and part.ndim == 3 else part
        for part in (value.scale, value.second, value.kept)
    )
    assert scale is not None
    return QTensor(value.data[:, start:stop], scale, value.spec, second, value.length, kept=kept)
