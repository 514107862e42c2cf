"""Reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from squamata.kernels.qtensor import Value, as_float
from squamata.kernels.rms_norm.ref import normalize
from squamata.kernels.site import Site


def run(y: Tensor, z: Value, weight: Tensor, epsilon: float, groups: int, out: Site) -> Value:
    gated = y * silu(as_float(z, y.dtype))
    normed = normalize(gated.unflatten(-1, (groups, -1)), epsilon).flatten(-2)
    return out.land(normed * weight)
