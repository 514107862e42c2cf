"""The compiled token against a plain float64 numpy step, float kinds, odd sizes, several thread counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from squamata.kernels.decode.cpu import ConvolutionPlan, DecodePlan, LayerPlan, RotationPlan, SitePlan
from squamata.kernels.packing import tile_float32, tile_int8

D, V, K = 24, 37, 4
SIZES = {"mamba1": {"E": 40, "N": 20, "R": 3}, "mamba2": {"E": 48, "N": 24, "H": 3, "G": 1}}
Weights = dict[str, np.ndarray]


def random_weights(kind: str, rng: np.random.Generator) -> Weights:
    size = SIZES[kind]
    E, N = size["E"], size["N"]
    heads = size.get("H", E)
    shapes: dict[str, tuple[int, ...]] = {"in_z": (E, D), "in_x": (E, D), "out_proj": (D, E)}
    if kind == "mamba1":
        shapes |= {"x_proj_dt": (size["R"], E), "x_proj_B": (N, E), "x_proj_C": (N, E), "dt_proj": (E, size["R"])}
    else:
        shapes |= {"in_B": (N, D), "in_C": (N, D), "in_dt": (heads, D), "gate_norm": (E,)}
    channels = E if kind == "mamba1" else E + 2 * N
    shapes |= {"norm": (D,), "taps": (channels, K), "conv_bias": (channels,), "dt_bias": (heads,), "skip": (heads,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    A = rng.random((E, N) if kind == "mamba1" else heads).astype(np.float32)
    return weights | {"A": -A - np.float32(0.1)}


def plan_of(kind: str, weights: Weights) -> LayerPlan:
    linears = {n: tile_float32(w) for n, w in weights.items() if n.startswith(("in_", "out_", "x_", "dt_proj"))}
    conv = ConvolutionPlan(weights["taps"], np.ones(len(weights["taps"]), np.float32), weights["conv_bias"], False)
    rest: dict[str, Any] = {name: weights.get(name) for name in ("norm", "dt_bias", "A", "skip", "gate_norm")}
    rotation = RotationPlan(SIZES[kind]["E"], 4, np.ones((1, 1), np.float32))
    heads = SIZES[kind].get("H", 1)
    return LayerPlan(
        epsilon=1e-5, conv=conv, states=SIZES[kind]["N"], rotation=rotation, heads=heads, **rest, **linears
    )  # fmt: skip


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def plain_layer(kind: str, w: Weights, x: np.ndarray, conv: np.ndarray, state: np.ndarray) -> np.ndarray:
    """One token of one layer, float64; ``conv`` (C, K - 1) and ``state`` (E, N) change in place."""
    size = SIZES[kind]
    E, N = size["E"], size["N"]
    x = rms(x) * w["norm"]
    z = w["in_z"] @ x
    inputs = w["in_x"] @ x if kind == "mamba1" else np.concatenate([w[n] @ x for n in ("in_x", "in_B", "in_C")])
    history = np.concatenate([conv, inputs[:, None]], 1)
    conv[:] = history[:, 1:]
    u = silu((history * w["taps"]).sum(1) + w["conv_bias"])
    if kind == "mamba1":
        B, C = w["x_proj_B"] @ u, w["x_proj_C"] @ u
        dt = np.logaddexp(0, w["dt_proj"] @ (w["x_proj_dt"] @ u) + w["dt_bias"])
        decay, skip = np.exp(dt[:, None] * w["A"]), w["skip"]
    else:
        u, B, C = u[:E], u[E : E + N], u[E + N :]
        heads = np.repeat(np.arange(size["H"]), E // size["H"])
        dt = np.logaddexp(0, w["in_dt"] @ x + w["dt_bias"])
        decay, dt, skip = np.exp(dt * w["A"])[heads][:, None], dt[heads], w["skip"][heads]
    state[:] = decay * state + (dt * u)[:, None] * B
    y = (state @ C + skip * u) * silu(z)
    if kind == "mamba2":
        y = rms(y) * w["gate_norm"]
    hadamard = np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]) / 2
    return w["out_proj"] @ (y.reshape(-1, 4) @ hadamard).reshape(-1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kinds", [("mamba1", "mamba1"), ("mamba2", "mamba2"), ("mamba1", "mamba2")])
def test_token_agrees_with_plain_numpy(kinds: tuple[str, ...], threads: int) -> None:
    rng = np.random.default_rng(1)
    layers = [random_weights(kind, rng) for kind in kinds]
    head, final = rng.standard_normal((V, D)).astype(np.float32), rng.random(D).astype(np.float32)
    plan = DecodePlan([plan_of(*pair) for pair in zip(kinds, layers, strict=True)], final, 1e-5, tile_float32(head))
    states = plan.new_states()
    plan.bind(states)
    exact = [(conv.astype(np.float64), state.astype(np.float64)) for conv, state, _ in states]
    for _ in range(6):
        token = rng.standard_normal(D).astype(np.float32)
        logits = plan.step(token, threads)
        residual = token.astype(np.float64)
        for kind, weights, (conv, state) in zip(kinds, layers, exact, strict=True):
            residual = residual + plain_layer(kind, weights, residual, conv, state)
        np.testing.assert_allclose(logits, head @ (rms(residual) * final), rtol=1e-4, atol=1e-4)
        for mine, plain in zip(states, exact, strict=True):
            for got, want in zip(mine[:2], plain, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.02, None])
def test_head_site_gives_the_same_integers(scale: float | None) -> None:
    rng = np.random.default_rng(2)
    q = rng.integers(-127, 128, (V, D)).astype(np.int8)
    site = SitePlan(-127, 127, None if scale is None else np.array([scale], np.float32))
    plan = DecodePlan([], np.ones(D, np.float32), 1e-5, tile_int8(q, 0.01), site)
    token = rng.standard_normal(D).astype(np.float32)
    x = rms(token.astype(np.float64))
    used = np.float32(np.abs(x).max() / 127 if scale is None else scale)
    codes = np.clip(np.rint(x / used), -127, 127).astype(np.int64)
    np.testing.assert_allclose(plan.step(token), (q.astype(np.int64) @ codes) * used * 0.01, rtol=1e-5)


def test_states_that_do_not_fit_are_refused() -> None:
    plan = DecodePlan(
        [plan_of("mamba1", random_weights("mamba1", np.random.default_rng(3)))],
        np.ones(D, np.float32), 1e-5, tile_float32(np.zeros((V, D), np.float32)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="bind"):
        plan.step(np.zeros(D, np.float32))
    ((conv, state, scales),) = plan.new_states()
    with pytest.raises(ValueError, match="float32"):
        plan.bind([(conv, state.astype(np.float64), scales)])
