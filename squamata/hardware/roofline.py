"""Roofline: what a named device's memory and arithmetic allow at best (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from squamata.hardware.technology import Device


@dataclass(frozen=True)
class Roof:
    """Decoding on one device. ``memory_ms``, ``compute_ms``: of one step of all sequences, each alone; ``floor_ms``:
    the larger, the least TPOT. ``intensity`` and ``ridge`` in operations a byte: left of the ridge memory decides.
    ``fits``: weights and caches are smaller than the device's memory."""

    device: str
    floor_ms: float
    memory_ms: float
    compute_ms: float
    intensity: float
    ridge: float
    bound: str
    fits: bool


def roof(device: Device, step_bytes: float, step_macs: Mapping[str, int], resident_bytes: float) -> Roof:
    """``step_bytes``: moved by one step; ``step_macs``: by precision, two operations each."""
    peaks = {"int8": device.int8_tops, "float16": device.float16_tflops, "float32": device.float32_tflops}
    compute = sum(2 * count / (peaks[kind] * 1e12) for kind, count in step_macs.items())
    memory = step_bytes / (device.memory_gb_per_s * 1e9)
    operations = 2 * sum(step_macs.values())
    return Roof(
        device=device.name,
        floor_ms=1000 * max(compute, memory),
        memory_ms=1000 * memory,
        compute_ms=1000 * compute,
        intensity=operations / step_bytes,
        ridge=operations / compute / (device.memory_gb_per_s * 1e9),
        bound="memory" if memory >= compute else "compute",
        fits=resident_bytes <= device.memory_gb * 1e9,
    )
