"""How loss and divergence change with the distance from the start of a window: what a recurrent state shows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from squamata.evaluate.result import Result
from squamata.evaluate.uncertainty import FEWEST_UNITS, Interval, ratio_interval

BLOCK = 128  # tokens whose sums are kept together


@dataclass(frozen=True)
class Cells:
    """Sums over blocks of ``BLOCK`` consecutive tokens of a window, float64 (n,), with the window of each and its place
    in it, counted in blocks."""

    window: np.ndarray
    block: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray
    kl: np.ndarray | None = None
    agrees: np.ndarray | None = None


@dataclass(frozen=True)
class Span(Result):
    """Tokens ``start`` to ``stop`` - 1 of every window that is so long. Intervals are 95 % bootstrap intervals over
    windows, or over blocks of ``BLOCK`` tokens if there are fewer than six windows; None for a single block."""

    start: int
    stop: int
    tokens: int
    nats_per_token: float
    nats_ci: Interval | None
    kl: float | None
    kl_ci: Interval | None


def spans(cells: Cells) -> tuple[Span, ...]:
    """The stretches 0 to 128, 128 to 256, 256 to 512 and so on, each as long as everything before it."""
    most = int(cells.block.max()) + 1
    edges = [0, *(2**power for power in range((most - 1).bit_length())), most]
    return tuple(_span(cells, start, stop) for start, stop in pairwise(edges) if stop > start)


def _span(cells: Cells, start: int, stop: int) -> Span:
    inside = np.flatnonzero((cells.block >= start) & (cells.block < stop))
    windows, unit = np.unique(cells.window[inside], return_inverse=True)
    unit = unit if len(windows) >= FEWEST_UNITS else np.arange(len(inside))
    tokens, nats = (np.bincount(unit, sums[inside]) for sums in (cells.tokens, cells.nats))
    kl = None if cells.kl is None else np.bincount(unit, cells.kl[inside])
    longest = int((cells.block[inside] * BLOCK + cells.tokens[inside]).max())
    return Span(
        start=start * BLOCK,
        stop=longest,
        tokens=int(tokens.sum()),
        nats_per_token=float(nats.sum() / tokens.sum()),
        nats_ci=ratio_interval(nats, tokens),
        kl=None if kl is None else float(kl.sum() / tokens.sum()),
        kl_ci=None if kl is None else ratio_interval(kl, tokens),
    )


def cell_places(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For windows that predict so many tokens: the first cell of each, and the window and block of every cell."""
    counts = np.array([-(-length // BLOCK) for length in lengths])
    first = np.concatenate([[0], counts.cumsum()[:-1]])
    window = np.repeat(np.arange(len(counts)), counts)
    return first, window, np.arange(len(window)) - first[window]
