"""Milliseconds of each CPU op in one layer of the 130M models, checked against its reference first.

    python benchmarks/cpu_ops.py [--length 512] [--threads 2] [--rounds 20]

The last column counts how often a layer runs the op; the sums project prefill without the head.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from squamata.kernels.causal_conv1d import cpu as conv_cpu
from squamata.kernels.causal_conv1d import empty_state
from squamata.kernels.causal_conv1d import ref as conv_ref
from squamata.kernels.gated_rms_norm import cpu as gated_cpu
from squamata.kernels.gated_rms_norm import ref as gated_ref
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard import cpu as hadamard_cpu
from squamata.kernels.hadamard import ref as hadamard_ref
from squamata.kernels.linear import Linear
from squamata.kernels.linear import cpu as linear_cpu
from squamata.kernels.linear import ref as linear_ref
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value
from squamata.kernels.rms_norm import cpu as norm_cpu
from squamata.kernels.rms_norm import ref as norm_ref
from squamata.kernels.selective_scan import cpu as scan_cpu
from squamata.kernels.selective_scan import ref as scan_ref
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan import cpu as ssd_cpu
from squamata.kernels.ssd_scan import ref as ssd_ref
from squamata.kernels.threads import share_threads
from squamata.spec.quant import QuantSpec

D, E, N1, R, K, H, P, N2, LAYERS = 768, 1536, 16, 48, 4, 24, 64, 128, 24  # of mamba-130m and mamba2-130m


@dataclass
class Case:
    """One op at one shape; ``model``: whose layers run it (empty: neither's W8A8 layers)."""

    name: str
    model: str
    backends: tuple[ModuleType, ModuleType]
    arguments: Callable[[], tuple[Any, ...]]
    tolerance: float = 1e-5


def site(size: int, scale: float = 0.03) -> Site:
    """An int8 site with one scale."""
    result = Site("site", Layout(("channel",), (size,)), QuantSpec(bits=8), mode="integer")
    result.set_scale(torch.tensor(scale))
    return result


def codes(length: int, size: int) -> Value:
    return site(size).land(torch.randn(1, length, size))


def weight(rows: int, columns: int, bits: int = 8) -> QTensor:
    largest = 2 ** (bits - 1) - 1
    integers = torch.randint(-largest, largest + 1, (rows, columns), dtype=torch.int8)
    if bits == 8:
        return QTensor(
            integers, torch.full((rows, 1), 0.001), QuantSpec.model_validate({"bits": 8, "granularity": "channel"})
        )
    spec = QuantSpec.model_validate({"bits": 4, "granularity": "group(128)"})
    return QTensor(pack_int4(integers), torch.full((rows, columns // 128), 0.01), spec, length=columns)


def projection(
    length: int, columns: int, segments: tuple[int, ...], bits: int = 8, land: bool = True
) -> tuple[Any, ...]:
    layer = Linear(weight(sum(segments), columns, bits), None, segments)
    return codes(length, columns), layer, [site(n) if land else None for n in segments]


def convolution(length: int, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    channels, sites = sum(sizes), [site(n) for n in sizes]
    taps = QTensor(torch.randint(-127, 128, (channels, K), dtype=torch.int8), torch.tensor(0.003), QuantSpec(bits=8))
    inputs = [codes(length, n) for n in sizes]
    return inputs, taps, torch.randn(channels), empty_state(1, K, sites, torch.float32), sites


def selective(length: int) -> tuple[Any, ...]:
    A = -torch.arange(1.0, N1 + 1).expand(E, N1).contiguous()
    u, dt, z = (codes(length, E) for _ in range(3))
    return (
        u,
        dt,
        A,
        codes(length, N1),
        codes(length, N1),
        torch.ones(E),
        z,
        torch.rand(E) * 4 - 5,
        torch.zeros(1, E, N1),
        site(E),
    )


def state_space_dual(length: int) -> tuple[Any, ...]:
    layout = HeadLayout(H, P, 1, N2, 256, (0.0, float("inf")))
    u, dt, B, C = codes(length, H * P), codes(length, H), codes(length, N2), codes(length, N2)
    A, bias = -torch.exp(2.7 * torch.rand(H)), torch.rand(H) * 4 - 5
    return u, dt, A, B, C, torch.ones(H), bias, torch.zeros(1, H, P, N2), layout


def cases(L: int) -> list[Case]:
    norm, linear, conv = (norm_cpu, norm_ref), (linear_cpu, linear_ref), (conv_cpu, conv_ref)
    both, first, second = "mamba mamba2", "mamba", "mamba2"
    rotation = Rotation.of_size(E)
    return [
        Case(
            "rms_norm", both, norm, lambda: (torch.randn(1, L, D), torch.randn(1, L, D), torch.rand(D), 1e-5, site(D))
        ),
        Case("linear in_proj 768 x 3072", first, linear, lambda: projection(L, D, (E, E))),
        Case("linear in_proj 768 x 3352", second, linear, lambda: projection(L, D, (E, E, N2, N2, H))),
        Case("linear x_proj 1536 x 80", first, linear, lambda: projection(L, E, (R, N1, N1))),
        Case("linear dt_proj 48 x 1536", first, linear, lambda: projection(L, R, (E,))),
        Case("linear out_proj 1536 x 768", both, linear, lambda: projection(L, E, (D,), land=False)),
        Case("causal_conv1d 1536", first, conv, lambda: convolution(L, (E,))),
        Case("causal_conv1d 1536 + 128 + 128", second, conv, lambda: convolution(L, (E, N2, N2))),
        Case("selective_scan", first, (scan_cpu, scan_ref), lambda: selective(L)),
        Case("ssd_scan", second, (ssd_cpu, ssd_ref), lambda: state_space_dual(L)),
        Case(
            "gated_rms_norm",
            second,
            (gated_cpu, gated_ref),
            lambda: (torch.randn(1, L, E), codes(L, E), torch.rand(E), 1e-5, 1, site(E)),
        ),
        Case("hadamard 1536", both, (hadamard_cpu, hadamard_ref), lambda: (torch.randn(1, L, E), rotation, site(E))),
        Case("linear W4A8 in_proj 768 x 3072", "", linear, lambda: projection(L, D, (E, E), bits=4)),
        Case("linear W4A8 out_proj 1536 x 768", "", linear, lambda: projection(L, E, (D,), bits=4, land=False)),
        Case(
            "linear W4A16 in_proj 768 x 3072",
            "",
            linear,
            lambda: (torch.randn(1, L, D), Linear(weight(2 * E, D, 4), None, (E, E), True), [None, None]),
            5e-5,  # activations of 16 bits
        ),
        Case(
            "linear W4A16 out_proj 1536 x 768",
            "",
            linear,
            lambda: (torch.randn(1, L, E), Linear(weight(D, E, 4), None, (), True), [None]),
            5e-5,
        ),
    ]


def flatten(result: Any) -> list[Value]:
    if isinstance(result, tuple):
        return [value for part in result for value in flatten(part)]
    return [result]


def check(results: Any, expected: Any, tolerance: float = 1e-5) -> str:
    """Worst difference: share of integers that differ, and relative L2 distance of floats. Raises if too far."""
    differing, total, distance = 0, 0, 0.0
    for value, truth in zip(flatten(results), flatten(expected), strict=True):
        if isinstance(truth, QTensor):
            difference = (value.data.int() - truth.data.int()).abs()
            if difference.max() > 1 or (difference > 0).sum() > 1 + 1e-5 * difference.numel():
                raise SystemExit("integers differ from the reference")
            differing, total = differing + int((difference > 0).sum()), total + difference.numel()
        else:
            assert isinstance(truth, Tensor)
            distance = max(distance, float((value - truth).norm() / truth.norm().clamp_min(1e-30)))
    if distance > tolerance:
        raise SystemExit(f"floats differ from the reference by {distance:.1e}")
    return f"{differing} of {total}" if total else f"{distance:.0e}"


def measure(call: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of each round, sorted."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    share_threads()
    torch.manual_seed(0)
    table = Table(title=f"{options.length} tokens, {options.threads} threads, milliseconds a layer")
    for column in ("op", "median", "least", "most", "reference", "differs", "layers of"):
        table.add_column(column, justify="left" if column in ("op", "layers of") else "right", no_wrap=True)
    sums = {"mamba": [0.0, 0.0], "mamba2": [0.0, 0.0]}
    for case in cases(options.length):
        cpu, ref = case.backends
        arguments = case.arguments()
        if not cpu.accepts(*arguments):
            raise SystemExit(f"{case.name}: the CPU kernel does not take this call")
        differs = check(cpu.run(*copy.deepcopy(arguments)), ref.run(*copy.deepcopy(arguments)), case.tolerance)
        times = measure(lambda cpu=cpu, arguments=arguments: cpu.run(*arguments), options.rounds)
        slow = measure(lambda ref=ref, arguments=arguments: ref.run(*arguments), 1)
        median = statistics.median(times)
        for model in case.model.split():
            sums[model][0] += median
            sums[model][1] += times[0]
        figures = (f"{value:.3f}" for value in (median, times[0], times[-1], slow[0]))
        table.add_row(case.name, *figures, differs, case.model)
    console = Console(width=120)
    console.print(table)
    for model, (median, least) in sums.items():
        rates = ", ".join(f"{1e3 * options.length / (LAYERS * value):.0f} tokens/s ({name} {value:.2f} ms a layer)"
                          for name, value in (("median", median), ("least", least)))  # fmt: skip
        console.print(f"{model}-130m, {LAYERS} layers, W8A8 prefill without head: {rates}")


if __name__ == "__main__":
    main()
