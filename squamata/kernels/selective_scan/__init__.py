"""Mamba-1's selective scan with skip and gate."""

from __future__ import annotations

from torch import Tensor

from squamata.kernels.dispatch import operation
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site


@operation
def selective_scan(  # type: ignore[empty-body]
    u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, z: Value, dt_bias: Tensor, state: Tensor, out: Site
) -> tuple[Value, Tensor]:
    """For every channel e and state index n (Gu and Dao 2023, algorithm 2):

    dt' = softplus(dt + dt_bias);  s[e, n] = exp(dt' A[e, n]) s[e, n] + dt' u[e] B[n];
    y[e] = (sum_n s[e, n] C[n] + D[e] u[e]) SiLU(z[e]), landed on ``out``.

    ``u``, ``dt``, ``z``: (B, L, E); ``B``, ``C``: (B, L, N); ``A``: (E, N), negative; ``state``: float (B, E, N).
    Every quantized input is dequantized element by element before it is used. Returns (y, last state).
    """
