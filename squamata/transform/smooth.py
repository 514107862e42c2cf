"""Smoothing: large channels of an activation made smaller, the weight's columns that read them larger (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from squamata.models.config import ModelConfig
from squamata.scales.statistics import Statistics
from squamata.transform.folds import Product, folds, largest_seen

SMALLEST = 1e-5  # of a maximum and of a factor, as SmoothQuant's code has it


def smooth(
    config: ModelConfig,
    kind: str,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
    products: tuple[Product, ...] = ("in_proj", "dt_proj", "out_proj"),
) -> dict[str, Tensor]:
    """x <- x / s, W <- W diag(s) with s_j = max |x_j|^alpha / max |W_j|^(1 - alpha) (arXiv 2211.10438, equation 4).

    ``products``: whose input is smoothed, where what comes before takes the division exactly (``folds``): in_proj,
    dt_proj of a Mamba-1, out_proj of a Mamba-2, conv. SmoothQuant-SSM (a baseline of Quamba, arXiv 2410.13229) also
    divides u before x_proj and a Mamba-1's gated y before out_proj, at run time; SiLU stands before both, so here they
    stay as they are. SquamataError after a rotation, which mixes the channels that were observed.
    """
    changed = dict(tensors)
    for product in products:
        for fold in folds(config, kind, changed, product):
            seen = largest_seen(statistics, fold).clamp_min(SMALLEST)
            read = fold.largest(changed).clamp_min(SMALLEST)
            changed = fold.apply(changed, (seen**alpha / read ** (1 - alpha)).clamp_min(SMALLEST))
    return changed
