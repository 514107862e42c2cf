"""Composition of the fine ops: the definition a fused kernel is tested against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.causal_conv1d import causal_conv1d
from squamata.kernels.conv_selective_scan.ref import OBSERVED_EVERY, tokens
from squamata.kernels.conv_ssd_scan import SSDScanLayer
from squamata.kernels.decay import DecaySites
from squamata.kernels.qtensor import Value, recalled, store
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan import ref as reference
from squamata.kernels.ssd_scan import ssd_scan
from squamata.kernels.ssd_scan.chunks import ChunkSites


def run(
    x: Value, B: Value, C: Value, dt: Value, layer: SSDScanLayer, conv: Value, state: Value, sites: Mapping[str, Site]
) -> Tensor:
    landing = (sites["u"], sites["B_conv"], sites["C_conv"])
    u, B, C = causal_conv1d((x, B, C), layer.conv_weight, layer.conv_bias, conv, landing)
    chunks = ChunkSites.of(sites) if u.shape[1] > 1 else None  # a token alone is no chunk: see there
    if chunks is not None:
        y, landed = chunks.scan(u, dt, B, C, state, (layer.A, layer.D, layer.dt_bias), layer.layout, sites)
        store(state, landed)
        return y
    decay = DecaySites.of(sites)
    scan = ssd_scan if decay is None else partial(reference.run, sites=decay)
    running = recalled(state, layer.A.dtype)
    length = u.shape[1]
    span = OBSERVED_EVERY if sites["state"].mode == "observe" else length
    ys = []
    for start in range(0, length, span):
        u_, dt_, B_, C_ = (tokens(value, start, start + span) for value in (u, dt, B, C))
        y, running = scan(u_, dt_, layer.A, B_, C_, layer.D, layer.dt_bias, running, layer.layout)
        landed = sites["state"].land(running)
        ys.append(y)
    store(state, landed)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
