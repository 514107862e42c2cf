"""Order the channels that a product reads by size, so that the largest can be kept in more bits (Atom)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from squamata.models.config import ModelConfig
from squamata.spec.sites import SORTED
from squamata.transform.observed import Observed


def sort_inputs(
    config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], statistics: Mapping[str, Observed]
) -> dict[str, Tensor]:
    """Leave ``mixer.in.order`` and ``mixer.out.order``: the channels (K,), int64, by rising mean of x^2.

    That is the diagonal of the Hessian of the product's squared error, up to a factor (Atom, arXiv 2310.19102; the
    metric of its script). No tensor changes: groups of a product's input are summed apart, so it is enough that the
    site and the weight's quantizer know which channels are in which.
    """
    return dict(tensors) | {
        f"{site}.order": statistics[site].second_moments().diagonal().argsort(stable=True) for site in SORTED
    }
