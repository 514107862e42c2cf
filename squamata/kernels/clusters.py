"""Weighted k-means in one dimension, exactly: every row of a matrix by itself."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray


def row_centres(values: NDArray[np.float32], weights: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Centres (N, count), rising, with the least sum_k w_k (x_k - nearest centre)^2 of every row of values (N, K).

    ``weights``: (N, K), at least 0; NaN takes an element out. A row whose weights are all 0 counts all elements alike;
    one with fewer elements than centres repeats its last, one without elements has zeros. Dynamic programming over the
    sorted row, whose best last cuts never move back (Gronlund et al. 2017, arXiv 1701.07204): the optimum that Lloyd's
    iterations only approach. Time: N count K log K.
    """
    centres = np.zeros((len(values), count))
    _rows(np.ascontiguousarray(values), np.ascontiguousarray(weights), centres)
    return centres


@njit(cache=True, nogil=True, parallel=True)
def _rows(values, weights, centres):  # type: ignore[no-untyped-def]
    for row in prange(len(values)):
        kept = np.flatnonzero(~np.isnan(weights[row]))
        if len(kept):
            x, w = values[row][kept].astype(np.float64), weights[row][kept].astype(np.float64)
            order = np.argsort(x)
            largest = w.max()
            w = w[order] / largest if largest > 0 else np.ones(len(w))
            _one_row(x[order], w, centres[row])


@njit(cache=True, nogil=True)
def _one_row(x, w, centres):  # type: ignore[no-untyped-def]
    """Centres of sorted values with weights of 1 at most."""
    size, count = len(x), min(len(centres), len(x))
    sums = np.zeros((3, size + 1))  # of w, w x, w x^2 before every place
    for place in range(size):
        wx = w[place] * x[place]
        sums[0, place + 1] = sums[0, place] + w[place]
        sums[1, place + 1] = sums[1, place] + wx
        sums[2, place + 1] = sums[2, place] + wx * x[place]
    cuts = np.zeros((count, size + 1), np.int32)  # of the best clusters 0..n of the first j values: where n begins
    least = np.zeros(size + 1)
    for place in range(1, size + 1):
        least[place] = _spread(sums, 0, place)
    for cluster in range(1, count):
        least = _with_one_more(sums, least, cuts[cluster])
    stop = size
    for cluster in range(count - 1, -1, -1):
        start = cuts[cluster, stop]
        centres[cluster] = _centre(x, w, start, stop, centres[cluster + 1] if stop < size else x[size - 1])
        stop = start
    centres[count:] = centres[count - 1]


@njit(cache=True, nogil=True)
def _spread(sums, start, stop):  # type: ignore[no-untyped-def]
    """Weighted squared distance of the values start..stop to their mean."""
    weight = sums[0, stop] - sums[0, start]
    if weight <= 0.0:
        return 0.0
    first = sums[1, stop] - sums[1, start]
    return max(0.0, sums[2, stop] - sums[2, start] - first * first / weight)


@njit(cache=True, nogil=True)
def _with_one_more(sums, before, cuts):  # type: ignore[no-untyped-def]
    """Least spread of the first j values, for every j, with one cluster more; ``cuts`` [j]: where the last begins.

    Places are visited coarse to fine, so that the cuts of both neighbours bound each search.
    """
    size = len(before) - 1
    least = np.zeros(size + 1)
    step = 1
    while 2 * step <= size:
        step *= 2
    while step >= 1:
        for place in range(step, size + 1, 2 * step):
            low = cuts[place - step]
            high = cuts[place + step] if place + step <= size else place
            best, where = np.inf, low
            for cut in range(low, min(high, place) + 1):
                cost = before[cut] + _spread(sums, cut, place)
                if cost < best:
                    best, where = cost, cut
            least[place], cuts[place] = best, where
        step //= 2
    return least


@njit(cache=True, nogil=True)
def _centre(x, w, start, stop, above):  # type: ignore[no-untyped-def]
    """Weighted mean of x[start:stop]; the plain one of values without weight; ``above`` if there are none."""
    if start == stop:
        return above
    weight, total, plain = 0.0, 0.0, 0.0
    for place in range(start, stop):
        weight += w[place]
        total += w[place] * x[place]
        plain += x[place]
    return total / weight if weight > 0.0 else plain / (stop - start)
