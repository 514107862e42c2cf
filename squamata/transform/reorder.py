"""Sort and cluster: neighbours of equal size, so that few scales serve all channels (Quamba2, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, product
from math import prod
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from squamata.errors import SquamataError
from squamata.models.config import ModelConfig
from squamata.spec.sites import MAMBA2
from squamata.transform.observed import Observed

Count = Annotated[int, Field(ge=1)]
Floats = NDArray[np.float64]
MAPPED = tuple(site for site, info in MAMBA2.items() if info.mapped)  # their leading axes are (head, channel)


@dataclass(frozen=True)
class Order:
    """Which old head (H,) and old channel (E,) comes to each place, and the group of each place (H, P); int64."""

    heads: Tensor
    channels: Tensor
    groups: Tensor


def reorder(
    config: ModelConfig,
    kind: str,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Observed],
    head_groups: Count = 4,
    channel_groups: Count = 4,
    statistic: Literal["maximum", "mean"] = "maximum",
    normalize: bool = True,
) -> dict[str, Tensor]:
    """Permute heads inside their SSD group and channels inside their head, and leave maps for ragged scales.

    Inside each head the channels are sorted by their size at ``u``; the heads of an SSD group fall into
    ``head_groups`` by the shape of their sorted sizes, the sorted places of a head group into ``channel_groups``; each
    pair of groups gets a number. ``statistic``: the largest |u| seen (paper), or the largest over the samples of its
    mean (upstream). ``normalize``: compare the heads' sizes by shape alone, each divided by its length; else as they
    are. Fewer heads or channels than groups: that many groups. Mamba-2 alone has heads; other layers stay.
    """
    if kind != "mamba2":
        return dict(tensors)
    if "mixer.rotation" in tensors:
        raise SquamataError("transform reorder: write it before hadamard, which mixes the channels that it sorts")
    order = find_order(
        _sizes(statistics["mixer.u"], statistic).cpu().numpy().astype(np.float64),
        config.n_groups,
        head_groups,
        channel_groups,
        normalize,
    )
    return _permuted(config, tensors, order) | {f"{site}.index": order.groups.clone() for site in MAPPED}


def reorder_within(
    config: ModelConfig,
    kind: str,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Observed],
    factor: Annotated[float, Field(ge=1.0)] = 1.5,
    head_groups: Count = 16,
    channel_groups: Count = 16,
) -> dict[str, Tensor]:
    """``reorder`` with as few groups as this layer needs: of all counts that are powers of two up to these, the pair
    with the fewest groups whose rounding noise (``noise``) is at most ``factor`` times that of a scale a channel, of
    equally many the one with the least noise; the largest counts if there is none.
    """
    if kind != "mamba2":
        return dict(tensors)
    sizes = _sizes(statistics["mixer.u"], "maximum").cpu().numpy().astype(np.float64)
    pairs = sorted(product(_powers(head_groups), _powers(channel_groups)), key=prod)
    for _, equal in groupby(pairs, prod):
        noises = {counts: noise(sizes, find_order(sizes, config.n_groups, *counts)) for counts in equal}
        heads, channels = min(noises, key=noises.__getitem__)
        if noises[heads, channels] <= factor:
            break
    return reorder(config, kind, tensors, statistics, heads, channels)


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on below ``most``, and ``most``."""
    return [2**power for power in range((most - 1).bit_length())] + [most]


def noise(sizes: Floats, order: Order) -> float:
    """Mean square of the error of rounding with one scale a group over that with one a channel: both grow with the
    square of the scale, which is the largest of the sizes (H, P) that share it."""
    own, groups = sizes.reshape(-1)[order.channels.numpy()], order.groups.numpy().reshape(-1)
    largest = np.zeros(groups.max() + 1)
    np.maximum.at(largest, groups, own)
    return float((largest[groups] ** 2).sum() / max((own**2).sum(), 1e-30))


def _sizes(observed: Observed, statistic: str) -> Tensor:
    """How large every channel is, (H, P)."""
    if statistic == "mean":
        assert observed.mean is not None
        return observed.mean
    low, high = observed.magnitude()
    return torch.maximum(low.abs(), high.abs())


def find_order(sizes: Floats, ssd_groups: int, head_groups: int, channel_groups: int, normalize: bool = True) -> Order:
    """The order for channels of these sizes, (H, P). Groups are numbered as they lie: the map never falls."""
    heads, width = sizes.shape
    ranks = np.argsort(sizes, axis=1, kind="stable")
    profiles = np.take_along_axis(sizes, ranks, axis=1)
    if normalize:
        profiles = profiles / np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-30)
    order: list[int] = []
    groups: list[NDArray[np.int64]] = []
    found = 0
    for first in range(0, heads, heads // ssd_groups):
        own = profiles[first : first + heads // ssd_groups]
        for members in cluster(own, head_groups):
            labels = segment(own[members].T, channel_groups)
            groups += [labels + found] * len(members)
            order += [first + member for member in members]
            found += int(labels[-1]) + 1
    channels = ranks[order] + np.array(order)[:, None] * width
    return Order(torch.tensor(order), torch.tensor(channels.reshape(-1)), torch.tensor(np.stack(groups)))


def cluster(points: Floats, count: int) -> list[list[int]]:
    """Ward's agglomeration (1963) of the rows (n, d) into at most ``count`` clusters, in order of their first row.

    Merges the pair that adds least to the sum of squares within clusters, |a| |b| / (|a| + |b|) times the squared
    distance of their means; of equal pairs the first.
    """
    clusters = [[row] for row in range(len(points))]
    while len(clusters) > count:
        means = np.stack([points[members].mean(0) for members in clusters])
        members = np.array([len(rows) for rows in clusters], np.float64)
        apart = ((means[:, None] - means[None]) ** 2).sum(-1)
        added = members[:, None] * members / (members[:, None] + members) * apart
        np.fill_diagonal(added, np.inf)
        one, other = divmod(int(added.argmin()), len(clusters))
        clusters[one] = sorted(clusters[one] + clusters.pop(other))
    return clusters


def segment(points: Floats, count: int) -> NDArray[np.int64]:
    """Labels (n,) of the rows (n, d) in ``count`` runs of neighbours with the least sum of squares within them.

    The best of all monotone k-means clusterings (Fisher 1958), by dynamic programming: upstream runs Lloyd's algorithm
    from fixed rows and asserts that its labels come out monotone.
    """
    rows = len(points)
    count = min(count, rows)
    within = _sums_of_squares(points)
    best, cuts = within[0], []
    for _ in range(count - 1):
        choices = best[:, None] + within  # [i, j]: the last run holds rows i .. j - 1
        cuts.append(choices.argmin(0))
        best = choices.min(0)
    labels, stop = np.zeros(rows, np.int64), rows
    for number, cut in enumerate(reversed(cuts)):
        start = int(cut[stop])
        labels[start:stop], stop = count - 1 - number, start
    return labels


def _sums_of_squares(points: Floats) -> Floats:
    """[i, j]: sum of squared distances of rows i .. j - 1 to their mean; infinite for no rows. (n + 1, n + 1)."""
    rows = len(points)
    sums = np.concatenate([np.zeros((1, points.shape[1])), points.cumsum(0)])
    squares = np.concatenate([[0.0], (points**2).sum(1).cumsum()])
    length = np.arange(rows + 1)[None] - np.arange(rows + 1)[:, None]
    spread = squares[None] - squares[:, None] - ((sums[None] - sums[:, None]) ** 2).sum(-1) / np.maximum(length, 1)
    return np.where(length > 0, np.maximum(spread, 0.0), np.inf)


def _permuted(config: ModelConfig, tensors: Mapping[str, Tensor], order: Order) -> dict[str, Tensor]:
    """The layer with its heads and channels in the new order; B and C belong to no head and stay."""
    inner, shared = config.d_inner, 2 * config.n_groups * config.d_state
    projected = torch.cat(
        [
            order.channels,
            inner + order.channels,
            torch.arange(2 * inner, 2 * inner + shared),
            2 * inner + shared + order.heads,
        ]
    )  # z, x, B and C, dt
    convolved = torch.cat([order.channels, torch.arange(inner, inner + shared)])
    rows = dict.fromkeys(("in_proj.weight", "in_proj.bias"), projected)
    rows |= dict.fromkeys(("conv.weight", "conv.bias"), convolved)
    rows |= dict.fromkeys(("A_log", "D", "dt_bias"), order.heads) | {"gate_norm.weight": order.channels}
    names = {f"mixer.{name}": index for name, index in rows.items() if f"mixer.{name}" in tensors}
    changed = dict(tensors) | {name: tensors[name][index] for name, index in names.items()}
    return changed | {"mixer.out_proj.weight": tensors["mixer.out_proj.weight"][:, order.channels]}
