"""One-dimensional k-means that is exact: against every way to cut a row, and never worse than scikit-learn's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from squamata.kernels.clusters import row_centres


def spread(x: NDArray, w: NDArray, centres: NDArray) -> float:
    """sum_k w_k (x_k - nearest centre)^2 in float64."""
    nearest = np.abs(x.astype(float)[:, None] - centres[None]).min(1)
    return float((w.astype(float) * nearest**2).sum())


def best_of_all(x: NDArray, w: NDArray, count: int) -> float:
    """The least spread over every way to cut the sorted row into ``count`` runs, some of them empty."""
    order = np.argsort(x)
    x, w = x[order].astype(float), w[order].astype(float)
    found = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), count - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(x))):
            weight = w[start:stop].sum()
            if weight > 0:
                mean = (w[start:stop] * x[start:stop]).sum() / weight
                total += (w[start:stop] * (x[start:stop] - mean) ** 2).sum()
        found = min(found, total)
    return float(found)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Values, and weights over orders of magnitude as gradients have them."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((rows, columns)) ** 2 * np.exp(3 * generator.standard_normal((rows, columns)))
    return generator.standard_normal((rows, columns)).astype(np.float32), weights.astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [1, 2, 5, 8, 9])
def test_no_way_to_cut_a_row_is_better(columns: int, count: int) -> None:
    x, w = problem(6, columns, seed=columns + 10 * count)
    found = row_centres(x, w, count)
    assert found.shape == (6, count) and bool((np.diff(found) >= 0).all())
    for row in range(6):
        assert spread(x[row], w[row], found[row]) == pytest.approx(best_of_all(x[row], w[row], count), abs=1e-6)


def test_elements_without_weight_and_rows_without_elements() -> None:
    x = np.array([[3.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 9.0]], np.float32)
    out = np.nan
    w = np.array([[1.0, 1.0, 0.0, out], [0.0, 0.0, 0.0, out], [out, out, out, out]], np.float32)
    found = row_centres(x, w, 3)
    assert spread(x[0, :3], w[0, :3], found[0]) == 0
    assert found[1].tolist() == [1.0, 2.0, 3.0]  # all alike if none counts
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    assert row_centres(x[:1], w[:1], 5)[0, -1] == 3.0  # the last again


def test_it_is_never_worse_than_lloyds_iterations() -> None:
    kmeans = pytest.importorskip("sklearn.cluster").KMeans
    x, w = problem(4, 300)
    found, ratios = row_centres(x, w, 16), []
    for row in range(4):
        fitted = kmeans(16, max_iter=50, random_state=0, n_init=1).fit(x[row][:, None], sample_weight=w[row])
        theirs = spread(x[row], w[row], fitted.cluster_centers_[:, 0])
        ratios.append(spread(x[row], w[row], found[row]) / theirs)
    assert max(ratios) <= 1 + 1e-6 and min(ratios) > 0.6, ratios
