"""Entropy calibration: the clipping whose coarse histogram is closest to the fine one (Migacz 2017, TensorRT)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.codec import range_to_scale
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.quant import QuantSpec

Candidates = Annotated[int, Field(ge=2)]
FINER = 4  # bins on a side for every level: fewer cannot tell thresholds apart


def entropy(statistics: Statistics, spec: QuantSpec, candidates: Candidates = 256) -> tuple[Tensor, Tensor | None]:
    """The threshold T with the least KL(P || Q), where P and Q are made from the histogram of |x| (``magnitudes``):

    for a candidate of m bins, P = the first m counts, all that lies beyond added to the last of them. Q: the first m
    counts without the added ones, merged into n = 2^(bits - 1) runs (bin j into run j n // m), each run's count
    spread evenly over those of its bins where P is not zero. Both are normalised; infinite where Q is zero and P is
    not. T = (m + 1/2) bin widths, at most the largest |x|. TensorRT tries every m from n to all; here it is
    ``candidates`` of them, evenly spaced, of up to 4096 bins. Ranges are cut to +-T. Zero's bin counts like others.
    """
    histogram = statistics.histogram
    assert histogram is not None
    levels, counts = spec.code_range[1] + 1, histogram.magnitudes().double()
    if histogram.half < FINER * levels:
        raise SquamataError(
            f"entropy cannot tell {levels} levels apart in the {histogram.half} bins that each of {len(counts)} groups "
            f"can have; use a coarser granularity"
        )
    least = torch.full((len(counts),), torch.inf, dtype=torch.float64)
    best = torch.full((len(counts),), float(histogram.half), dtype=torch.float64)
    for kept in dict.fromkeys(torch.linspace(histogram.half, levels, candidates).long().tolist()):
        found = divergence(counts, kept, levels)
        best = torch.where(found < least, kept + 0.5, best)
        least = torch.minimum(least, found)
    threshold = (best * histogram.width).float().reshape(statistics.partition.shape())
    return range_to_scale(*statistics.within(threshold), spec)


def divergence(counts: Tensor, kept: int, levels: int) -> Tensor:
    """KL(P || Q) in nats for the candidate of the first ``kept`` bins: float64 counts (groups, bins) -> (groups,)."""
    inside = counts[:, :kept]
    reference = inside.clone()
    reference[:, -1] += counts[:, kept:].sum(1)
    occupied = reference > 0
    run = torch.arange(kept) * levels // kept
    nothing = torch.zeros(len(counts), levels, dtype=counts.dtype)
    mass = nothing.index_add(1, run, inside)
    share = nothing.index_add(1, run, occupied.to(counts.dtype))
    spread = (mass / share.clamp_min(1))[:, run] * occupied
    P = reference / reference.sum(1, keepdim=True)
    Q = spread / spread.sum(1, keepdim=True)
    terms = torch.where(occupied, P * torch.log(P / Q), 0.0)
    return terms.sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def entropy_needs(spec: QuantSpec, **parameters: object) -> Needs:
    """A histogram."""
    return Needs(histogram=True)
