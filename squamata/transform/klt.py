"""KLT-enhanced rotation: principal directions first, then Hadamard, so that all channels vary alike (MambaQuant)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from squamata.kernels.hadamard import Rotation
from squamata.kernels.partition import Layout, Partition
from squamata.models.config import ModelConfig
from squamata.spec.granularity import Granularity
from squamata.transform.hadamard import BLOCK, rotate_weight
from squamata.transform.observed import Basis, Observed
from squamata.transform.residual import turn_ends, turn_layer

Seen = Mapping[str, Observed | Basis]


def klt(config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], statistics: Seen) -> dict[str, Tensor]:
    """x <- x K H^T for the residual stream, and for dt_low of a Mamba-1 without norms on it; all of it folded.

    K: eigenvectors of the covariance of x. A Hadamard matrix H alone leaves channels whose variance depends on K; after
    K every channel has the mean of the eigenvalues (MambaQuant, arXiv 2501.13484, section 4.2). For the stream, K is of
    the normalized embeddings that the first layer reads, as in the original code. SquamataError unless the norm's
    weight is folded.
    """
    stream = statistics["stream"]
    assert isinstance(stream, Basis)
    changed = turn_layer(tensors, partial(_times, turn=enhanced(stream)))
    if kind != "mamba1" or config.bcdt_norm_epsilon is not None:
        return changed
    observed, rank = statistics["mixer.dt_low"], config.dt_rank
    assert isinstance(observed, Observed)
    turn, rows = enhanced(observed.basis()), tensors["mixer.x_proj.weight"]
    turned = _times(rows[:rank].T, turn).T
    return changed | {
        "mixer.x_proj.weight": torch.cat([turned, rows[rank:].to(turned.dtype)]),
        "mixer.dt_proj.weight": _times(tensors["mixer.dt_proj.weight"], turn),
    }


def klt_ends(config: ModelConfig, tensors: Mapping[str, Tensor], statistics: Seen) -> dict[str, Tensor]:
    """The embedding's rows, which write the stream first, and the head's, which read it last."""
    stream = statistics["stream"]
    assert isinstance(stream, Basis)
    return turn_ends(tensors, partial(_times, turn=enhanced(stream)))


def enhanced(basis: Basis) -> Tensor:
    """K H^T, orthogonal, float64 (K, K). Where this size has no Hadamard matrix, H is block-diagonal, and only the
    channels of a block vary alike.
    """
    return rotate_weight(basis.vectors, Rotation.of_size(len(basis.vectors)))


def stream_basis(config: ModelConfig, embedded: Iterable[Tensor]) -> Basis:
    """Of what the first layer's norm, without its weight, makes of embedded calibration tokens (tokens, D)."""
    partition = Partition(Granularity(("channel",)), Layout(("channel",), (config.d_model,)))
    observed = Observed(partition, pairs=True)
    for rows in embedded:
        exact = rows.double()
        normalized = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + config.norm_epsilon)
        observed.update(normalized.float()[None])
    return observed.basis()


def _times(weight: Tensor, turn: Tensor) -> Tensor:
    """weight @ turn, computed in float64 a block of rows at a time, kept in float32 (float64 stays)."""
    turned = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    rows = max(1, BLOCK // weight.shape[-1])
    for part, into in zip(weight.split(rows), turned.split(rows), strict=True):
        into.copy_(part.double() @ turn)
    return turned
