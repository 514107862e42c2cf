"""Mamba-2's scan (state-space duality) with skip."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import Value


@dataclass(frozen=True)
class HeadLayout:
    """H heads of P channels in G groups that share B and C, N state indices, chunks of ``chunk`` tokens."""

    heads: int
    head_dim: int
    groups: int
    d_state: int
    chunk: int
    time_step_limit: tuple[float, float]


@operation
def ssd_scan(  # type: ignore[empty-body]
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, dt_bias: Tensor, state: Tensor, layout: HeadLayout
) -> tuple[Tensor, Tensor]:
    """For every head h, channel p and state index n (Dao and Gu 2024, eq. 1 and section 6):

    dt' = clamp(softplus(dt + dt_bias), limit);  s[h, p, n] = exp(dt' A[h]) s[h, p, n] + dt' u[h, p] B[g(h), n];
    y[h, p] = sum_n s[h, p, n] C[g(h), n] + D[h] u[h, p].

    ``u``: (B, L, H P); ``dt``: (B, L, H); ``B``, ``C``: (B, L, G N); ``A``, ``D``: (H,); ``state``: float (B, H, P, N).
    Quantized inputs are dequantized before they are used. Returns (y float (B, L, H P), last state).
    """
