"""Float32 primitives against float64, over the whole range and at its edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from numba import njit

from squamata.kernels import simd

RNG = np.random.default_rng(0)
WIDE = np.concatenate(
    [np.linspace(-87, 88, 100001), RNG.standard_normal(20000), *(s * np.logspace(-30, 1.9, 20000) for s in (1, -1))]
).astype(np.float32)


def mapped(function: Any, x: np.ndarray) -> np.ndarray:
    """The function applied in a compiled loop, into a poisoned buffer."""

    @njit
    def loop(x: np.ndarray, out: np.ndarray) -> None:
        for i in range(x.size):
            out[i] = function(x[i])

    out = np.full_like(x, np.nan)
    loop(x, out)
    return out


def units_in_last_place(got: np.ndarray, exact: np.ndarray) -> float:
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - exact) / spacing))


@pytest.mark.parametrize(
    ("function", "exact", "units"),
    [
        (simd.exp, np.exp, 1.5),
        (simd.softplus, lambda x: np.logaddexp(0.0, x), 3.0),
        (simd.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3.0),
        (simd.silu, lambda x: x / (1 + np.exp(-x)), 3.0),
        (simd.log1p, lambda x: np.log1p(np.abs(x)), 3.0),
    ],
)
def test_accuracy(function: Any, exact: Callable[[np.ndarray], np.ndarray], units: float) -> None:
    x = np.abs(WIDE) if function is simd.log1p else WIDE
    assert units_in_last_place(mapped(function, x), exact(x.astype(np.float64))) < units


def test_exp_at_its_edges() -> None:
    x = np.array([-np.inf, -1e30, -104.5, -95.0, 0.0, 88.72, 200.0, np.inf, np.nan], np.float32)
    got = mapped(simd.exp, x)
    assert got[:3].tolist() == [0.0, 0.0, 0.0] and got[4] == 1.0
    assert abs(got[3] - np.exp(-95.0)) < 2e-45
    assert np.isfinite(got[5:8]).all() and (got[6:8] > 3.4e38).all() and np.isnan(got[8])


def test_rounding_modes() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -2.5, 0.3, -7.7], np.float32)
    assert mapped(simd.rint, x).tolist() == [0, 2, 2, 0, -2, 0, -8]
    assert mapped(simd.round_away, x).tolist() == [1, 2, 3, -1, -3, 0, -8]
    assert mapped(simd.truncate, x).tolist() == [0, 1, 2, 0, -2, 0, -7]


def test_float64_is_refused() -> None:
    with pytest.raises(Exception, match=r"argument|signature|implementation"):
        mapped(simd.exp, np.zeros(3))


def test_feature_probe() -> None:
    names = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
    assert simd.has_vnni(dict.fromkeys(names, True))
    assert not simd.has_vnni(dict.fromkeys(names[:3], True)) and not simd.has_vnni({})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", False),  # what numba makes of NUMBA_CPU_NAME=generic
        ("+avx512f,+avx512bw,+avx512vl,+avx512vnni", True),
        ("+avx512f,+avx512bw,+avx512vl,-avx512vnni", False),
    ],
)
def test_instructions_are_those_of_the_cpu_that_is_compiled_for(
    given: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instruction that the target lacks ends the process when LLVM meets it."""
    monkeypatch.setattr(numba.config, "CPU_FEATURES", given)
    assert simd.has_vnni() is found
