"""Coarse op: Mamba-1 from the convolution to the gated scan output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from squamata.kernels.dispatch import coarse_operation
from squamata.kernels.linear import Linear
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@dataclass
class SelectiveScanLayer:
    """Parameters between in_proj and out_proj of a Mamba-1 block, ready to use (A = -exp(A_log), float).

    ``bcdt_norm_epsilon``: FalconMamba's weightless RMS norm on dt_low, B and C.
    """

    conv_weight: Value
    conv_bias: Tensor | None
    x_proj: Linear
    dt_proj: Linear
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    bcdt_norm_epsilon: float | None


@coarse_operation
def conv_selective_scan(  # type: ignore[empty-body]
    x: Value, z: Value, layer: SelectiveScanLayer, conv: Value, state: Value, sites: Mapping[str, Site]
) -> Value:
    """``causal_conv1d`` onto u; ``linear`` onto dt_low, B, C; ``linear`` onto dt; ``selective_scan`` onto y.

    x_proj reads u, or what the convolution's output becomes on ``u_proj`` if that site has a spec.
    The scan's exp(dt A) lands on ``decay``, dt A on ``log_decay`` if these sites have a spec: then in the reference.
    ``conv`` (B, E, K - 1) and ``state`` (B, E, N), in the storage of their sites, are updated in place.
    """
