"""Decode speed on one GPU: named shapes, random weights, recipe by recipe, each checked before it is timed.

    python benchmarks/gpu.py --shapes mamba2-2.7b mamba-2.8b --recipes bfloat16 quamba-w8a8 w4a8 w4a16 --json out.json

TPOT: median over replays of the captured step at batch 1 (or --batch), in milliseconds, with the 10th and 90th
percentile. *floor*: bytes that a step must move (weights, scales, state read and written) over the measured bandwidth
of a device copy. The check compares two layers of the same widths, a few tokens from a fresh state, with the reference
operations on the same device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squamata.kernels.dispatch import use_backend
from squamata.kernels.hadamard import Rotation
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.load.random_model import random_tensors
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig, parameter_shapes, shape
from squamata.models.lm import LanguageModel, model_layouts
from squamata.quantize import quantize_tensors
from squamata.run.graphs import CapturedDecoder
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites

LARGE = 2**20  # elements from which a random weight is drawn as codes, on the device
SITE_RANGE = {"state": 2.0, "u": 3.0, "B_conv": 3.0, "C_conv": 3.0, "out": 5.0}  # largest value, else 4


def random_checkpoint(config: ModelConfig, recipe: Recipe, device: str, seed: int = 0) -> Checkpoint:
    """A quantized model in which every number is random and activations stay of order one."""
    torch.manual_seed(seed)
    specs = recipe.resolve(config.blocks)
    layouts = model_layouts(config)
    tensors: dict[str, Value] = {}
    for name, size in parameter_shapes(config).items():
        elements = torch.Size(size).numel()
        if elements < LARGE:
            with torch.device("cpu"):
                drawn = {name: random_tensor(config, name, size)}
                quantized = quantize_tensors(recipe, drawn, specs, layouts)
            tensors[name] = moved(quantized[name], device)
        elif name in specs:
            tensors[name] = random_codes(size, specs[name], Partition(specs[name].granularity, layouts[name]), device)
        else:
            spread = 0.5 if name == "embedding.weight" else size[-1] ** -0.5
            tensors[name] = torch.randn(size, device=device, dtype=torch.bfloat16) * spread
    if any(transform.name == "hadamard" for transform in recipe.transforms):
        rotation = Rotation.of_size(config.d_inner)
        for layer in range(config.n_layers):
            tensors[f"layers.{layer}.mixer.rotation"] = torch.tensor([rotation.size, rotation.block])
    return Checkpoint(config, tensors, recipe, random_sites(config, specs, device))


def random_tensor(config: ModelConfig, name: str, size: tuple[int, ...]) -> Tensor:
    """One of the small tensors, as before training, with noise where it would be trivial."""
    noise = torch.randn(size)
    if name.endswith(("A_log", "dt_bias")):
        one_layer = config.model_copy(update={"blocks": config.blocks[:1]})
        return random_tensors(one_layer, prefix="layers.0.mixer." + name.split(".")[-1])[
            f"layers.0.{name.split('.', 2)[2]}"
        ]
    if name.endswith((".D", "norm.weight")):
        return 1 + 0.1 * noise
    return noise * (0.02 if name.endswith("bias") else size[-1] ** -0.5)


def random_codes(size: tuple[int, ...], spec: Any, partition: Partition, device: str) -> QTensor:
    low, high = spec.code_range
    codes = torch.randint(low, high + 1, size, dtype=torch.int8, device=device)
    deviation = 3**0.5 / (spec.span * size[-1] ** 0.5)
    scale = deviation * (0.8 + 0.4 * torch.rand(partition.shape(), device=device))
    if spec.scale_dtype == "float16":
        scale = scale.half().float()
    packed = pack_int4(codes) if spec.bits == 4 else codes
    return QTensor(packed, partition.expand(scale), spec, None, size[-1] if spec.bits == 4 else None)


def random_sites(config: ModelConfig, specs: dict[str, Any], device: str) -> dict[str, Tensor]:
    found = {}
    for name, info in all_sites(config.blocks).items():
        spec = specs.get(name)
        if info.kind in ("activation", "state") and spec is not None and not spec.dynamic:
            assert spec.granularity.per_tensor, f"{name}: this benchmark draws one scale a site"
            found[f"{name}.scale"] = torch.tensor(
                SITE_RANGE.get(name.rsplit(".", 1)[-1], 4.0) / spec.span, device=device
            )
    return found


def moved(value: Value, device: str) -> Value:
    if isinstance(value, QTensor):
        return QTensor(value.data.to(device), value.scale.to(device), value.spec, value.second, value.length)
    return value.to(device)


def disagreement(config: ModelConfig, recipe: Recipe, options: dict[str, Any], batch: int, tokens: int = 4) -> float:
    """Largest relative error (norms) of the logits of a few tokens, two layers, against the reference."""
    small = config.model_copy(update={"blocks": config.blocks[:2]})
    with torch.device("cuda"), torch.no_grad(), use_backend("ref"):
        model = LanguageModel(random_checkpoint(small, recipe, "cuda", seed=1))
        decoder = CapturedDecoder(model, batch, **options)
        cache = model.new_cache(batch)
        worst = 0.0
        for _ in range(tokens):
            ids = torch.randint(config.vocab_size, (batch,))
            wanted = model.step(ids, cache)
            decoder.logits.fill_(float("nan"))
            got = decoder.step(ids)
            worst = max(worst, float((got - wanted).norm() / wanted.norm()))
            if not torch.isfinite(got).all():
                return float("nan")
    return worst


def milliseconds(launch: Callable[[], Any], repeats: int = 60, warm: int = 5) -> list[float]:
    """Times of single launches, sorted."""
    for _ in range(warm):
        launch()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read plus written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (statistics.median(milliseconds(lambda: target.copy_(source), 20)) * 1e-3)


def kernel_times(decoder: CapturedDecoder) -> dict[str, dict[str, float]]:
    """Microseconds a launch of every kind of kernel: all launches of one kind in one graph, one after the other."""
    kernels = sorted(decoder.plan.kernels(), key=lambda kernel: kernel[0])
    found = {}
    for name, group in groupby(kernels, key=lambda kernel: kernel[0]):
        launches = [launch for _, launch in group]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        median = statistics.median(milliseconds(graph.replay, 20))
        found[name] = {"launches": len(launches), "microseconds": 1e3 * median / len(launches)}
    decoder.reset()
    return found


def measure(name: str, recipe_name: str, batch: int, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    config = shape(name)
    recipe = Recipe.read("float" if recipe_name == "bfloat16" else recipe_name)
    options: dict[str, Any] = {"state_dtype": torch.float16}
    error = disagreement(config, recipe, {"weights": "bfloat16", "state_dtype": torch.float32}, batch)
    model = LanguageModel(random_checkpoint(config, recipe, "cuda"), dtype=torch.bfloat16)
    decoder = CapturedDecoder(model, batch, **options)
    del model
    decoder.step(torch.randint(config.vocab_size, (batch,), device="cuda"))
    times = milliseconds(decoder.replay)
    finite = bool(torch.isfinite(decoder.logits).all())
    moved_bytes = decoder.plan.weight_bytes + decoder.plan.state_bytes
    tpot = statistics.median(times)
    floor = 1e3 * moved_bytes / bandwidth
    return {
        "shape": name, "recipe": recipe_name, "batch": batch, "error": error, "finite": finite, "tpot_ms": tpot,
        "p10_ms": times[len(times) // 10], "p90_ms": times[-len(times) // 10], "bytes": moved_bytes,
        "bandwidth_tb_s": moved_bytes / tpot * 1e-9, "floor_ms": floor, "share_of_floor": floor / tpot,
        "kernels": kernel_times(decoder),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["mamba2-130m", "mamba2-2.7b", "mamba-2.8b", "mamba2-8b"])
    parser.add_argument("--recipes", nargs="+", default=["bfloat16", "quamba-w8a8", "w4a8", "w4a16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    print(f"{device}, torch {torch.__version__}; device copy {bandwidth * 1e-12:.2f} TB/s")
    print("shape        recipe         b  TPOT ms     p10     p90      MB  TB/s  floor  share    error")
    rows = []
    for name in arguments.shapes:
        for recipe in arguments.recipes:
            for batch in arguments.batch:
                started = time.perf_counter()
                row = measure(name, recipe, batch, bandwidth)
                rows.append(row)
                print(
                    f"{name:12} {recipe:12} {batch:3} {row['tpot_ms']:8.3f} {row['p10_ms']:7.3f} {row['p90_ms']:7.3f} "
                    f"{row['bytes'] / 1e6:7.0f} {row['bandwidth_tb_s']:5.2f} {row['floor_ms']:6.3f} "
                    f"{100 * row['share_of_floor']:5.0f}% {row['error']:8.1e}   ({time.perf_counter() - started:.0f} s)"
                )
                kernels = ", ".join(
                    f"{key} {value['launches']}x{value['microseconds']:.2f}" for key, value in row["kernels"].items()
                )
                print(f"   us a launch: {kernels}", flush=True)
                torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device, "copy_bandwidth": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
