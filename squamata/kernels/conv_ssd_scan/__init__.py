"""Coarse op: Mamba-2 from the convolution to the scan output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from squamata.kernels.dispatch import coarse_operation
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan import HeadLayout


@dataclass
class SSDScanLayer:
    """Parameters between in_proj and the gated norm of a Mamba-2 block, ready to use (A = -exp(A_log), float)."""

    conv_weight: Value
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    layout: HeadLayout


@coarse_operation
def conv_ssd_scan(  # type: ignore[empty-body]
    x: Value, B: Value, C: Value, dt: Value, layer: SSDScanLayer, conv: Value, state: Value, sites: Mapping[str, Site]
) -> Tensor:
    """``causal_conv1d`` of x, B, C onto u, B_conv, C_conv; ``ssd_scan``; the new state landed on state.

    The scan's exp(dt A) lands on ``decay``, dt A on ``log_decay`` if these sites have a spec: then in the reference.
    What ``ssd_scan/chunks.py`` makes of a chunk lands on ``scores``, ``u_scaled``, ``chunk_decay`` in the same way.
    ``conv`` (B, E + 2 G N, K - 1) and ``state`` (B, H, P, N), in the storage of their sites, are updated in place.
    """
