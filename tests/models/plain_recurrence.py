"""Mamba-1 and Mamba-2 written straight from the papers: float64 numpy, one token and one head at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from squamata.models.config import ModelConfig

Array = NDArray[np.float64]


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0.0)


def rms_norm(x: Array, epsilon: float) -> Array:
    return x / np.sqrt(np.mean(x * x) + epsilon)


def logits(config: ModelConfig, tensors: dict[str, Array], ids: list[int]) -> Array:
    """(L, V) for one sequence."""
    residual = [tensors["embedding.weight"][token] for token in ids]
    for layer, kind in enumerate(config.blocks):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): value for name, value in own.items()}
        normed = [rms_norm(x, config.norm_epsilon) * own["norm.weight"] for x in residual]
        mixed = (mamba1 if kind == "mamba1" else mamba2)(config, mixer, normed)
        residual = [x + y for x, y in zip(residual, mixed, strict=True)]
    head = tensors.get("head.weight", tensors["embedding.weight"])
    return np.stack([head @ (rms_norm(x, config.norm_epsilon) * tensors["final_norm.weight"]) for x in residual])


def project(mixer: dict[str, Array], name: str, x: Array) -> Array:
    return mixer[f"{name}.weight"] @ x + mixer.get(f"{name}.bias", 0.0)


def convolve(mixer: dict[str, Array], window: list[Array]) -> Array:
    """Depthwise, the newest input last in ``window``; then SiLU (Mamba, figure 3)."""
    weight = mixer["conv.weight"]  # (C, K)
    total = np.zeros(len(weight))
    for age, x in enumerate(reversed(window)):
        if age < weight.shape[1]:
            total += weight[:, weight.shape[1] - 1 - age] * x
    return silu(total + mixer.get("conv.bias", 0.0))


def mamba1(config: ModelConfig, mixer: dict[str, Array], inputs: list[Array]) -> list[Array]:
    """Gu and Dao 2023, algorithm 2, with h_t = exp(dt A) h + dt B x."""
    E, N, R = config.d_inner, config.d_state, config.dt_rank
    state, window, outputs = np.zeros((E, N)), [], []
    A = -np.exp(mixer["A_log"])
    for h in inputs:
        xz = project(mixer, "in_proj", h)
        window.append(xz[:E])
        u = convolve(mixer, window)
        low, B, C = np.split(mixer["x_proj.weight"] @ u, [R, R + N])
        if config.bcdt_norm_epsilon is not None:
            low, B, C = (rms_norm(part, config.bcdt_norm_epsilon) for part in (low, B, C))
        dt = softplus(mixer["dt_proj.weight"] @ low + mixer["dt_bias"])
        for e in range(E):
            state[e] = np.exp(dt[e] * A[e]) * state[e] + dt[e] * B * u[e]
        y = (state @ C + mixer["D"] * u) * silu(xz[E:])
        outputs.append(project(mixer, "out_proj", y))
    return outputs


def mamba2(config: ModelConfig, mixer: dict[str, Array], inputs: list[Array]) -> list[Array]:
    """Dao and Gu 2024, equation 1 with scalar A a head, heads of a group sharing B and C (section 7.2)."""
    E, N, G, H, P = config.d_inner, config.d_state, config.n_groups, config.n_heads, config.head_dim
    state, window, outputs = np.zeros((H, P, N)), [], []
    for h in inputs:
        z, xBC, dt = np.split(project(mixer, "in_proj", h), [E, 2 * E + 2 * G * N])
        window.append(xBC)
        u, B, C = np.split(convolve(mixer, window), [E, E + G * N])
        dt = np.clip(softplus(dt + mixer["dt_bias"]), *config.time_step_limit)
        y = np.zeros(E)
        for head in range(H):
            group = slice(head // (H // G) * N, (head // (H // G) + 1) * N)
            own = slice(head * P, (head + 1) * P)
            decay = np.exp(-dt[head] * np.exp(mixer["A_log"][head]))
            state[head] = decay * state[head] + dt[head] * np.outer(u[own], B[group])
            y[own] = state[head] @ C[group] + mixer["D"][head] * u[own]
        gated = y * silu(z)
        parts = [rms_norm(part, config.gate_norm_epsilon) for part in np.split(gated, G)]
        outputs.append(project(mixer, "out_proj", np.concatenate(parts) * mixer["gate_norm.weight"]))
    return outputs
