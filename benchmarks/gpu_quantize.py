"""Quantization on a GPU: seconds and peak memory of a whole recipe on random weights of a named shape.

    python benchmarks/gpu_quantize.py --shape mamba2-2.7b --recipe quamba2-w4a8 --samples 512 --length 512

Checked first on the bundled model with ``w4a8``: CPU (the reference) and GPU give the same codes but for ties (at most
1e-3). The same with GPTQ, and what is timed, are compared too, but not judged by it: a tie that falls the other way
moves what later columns make up for, and where channels are sorted nearly equal ones may change places, which the
rotation spreads over a whole layer. ``--layers N``: the first N layers only. ``--where``: seconds by what they went
into, with the device waited for at every step, so more of them in all. Random weights are made by other threads
meanwhile, as a disk would give them; the result is made layer by layer and dropped; writing it is not timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor
from squamata.load.hub import bundled
from squamata.load.random_model import RandomSource
from squamata.load.source import open_source
from squamata.models.config import SHAPES, ModelConfig
from squamata.parts import QuantizedParts
from squamata.spec.recipe import Named, Recipe

PLAIN, MOST_DIFFERING = "w4a8", 1e-3  # the same rotations and grids, rounded to nearest, nothing reordered
AHEAD, WORKERS = 8, 8  # layers of random weights that are made before they are asked for
STEPS = (
    ("parts", "QuantizedParts._read"),
    ("parts", "QuantizedParts._observed"),
    ("parts", "QuantizedParts._scales_of"),
    ("parts", "QuantizedParts._grams"),
    ("parts", "run_layer"),
    ("parts", "quantize_tensors"),
    ("transform", "apply"),
    ("quantize.gptq", "inverse_factor"),
    ("scales.gram", "Gram.update"),
    ("scales.statistics", "Statistics.update"),
    ("scales.statistics", "quantile"),
    ("kernels.linear.ref", "run"),
    ("kernels.linear.triton", "run"),
    ("kernels.causal_conv1d.ref", "run"),
    ("kernels.causal_conv1d.triton", "run"),
    ("kernels.ssd_scan.ref", "run"),
    ("kernels.ssd_scan.triton", "run"),
    ("kernels.selective_scan.ref", "run"),
    ("kernels.rms_norm.ref", "run"),
    ("kernels.gated_rms_norm.ref", "run"),
    ("kernels.hadamard.ref", "run"),
    ("kernels.hadamard.triton", "run"),
)


def compared(recipe: Recipe) -> tuple[float, float, dict[str, float]]:
    """The bundled model on CPU and GPU: fraction of weight codes that differ, relative distance of the weights, and
    the fractions of the tensors that differ most."""
    source = open_source(bundled())
    ids = torch.randint(source.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    made = []
    for device in ("cpu", "cuda"):
        parts = QuantizedParts(source, recipe, [ids], device)
        with use_backend("ref") if device == "cpu" else nullcontext():
            made.append({name: value for part in parts.each() for name, value in part.items()})
    different = total = 0
    worst: dict[str, float] = {}
    distance = size = 0.0
    for name, value in made[0].items():
        other = made[1][name]
        if isinstance(value, QTensor) and isinstance(other, QTensor):
            count = int((value.codes() != other.codes().cpu()).sum())
            different, total = different + count, total + value.codes().numel()
            worst[name] = count / value.codes().numel()
            ours, theirs = (each.dequantize(torch.float64).cpu() for each in (other, value))
            distance, size = distance + float((ours - theirs).square().sum()), size + float(theirs.square().sum())
    named = dict(sorted(worst.items(), key=lambda item: -item[1])[:4])
    return different / total, (distance / size) ** 0.5, named


def check(recipe: Recipe) -> dict[str, float]:
    """The three comparisons; the program ends if the first fails."""
    plain = Recipe.read(PLAIN)
    found = {}
    for what, each in ((PLAIN, plain), (f"{PLAIN}, gptq", plain.model_copy(update={"weights": Named(name="gptq")})),
                       (recipe.name, recipe)):  # fmt: skip
        found[what], distance, worst = compared(each)
        print(f"bundled model, CPU and GPU, {what}: {found[what]:.2e} of the codes differ, the weights by "
              f"{distance:.2e}; most: {worst}", flush=True)  # fmt: skip
        if each is plain and found[what] > MOST_DIFFERING:
            raise SystemExit("GPU and CPU disagree: nothing is timed")
    return found


class MadeAhead:
    """Random weights that threads make before they are asked for, in the order in which a recipe reads them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.source = RandomSource(config)
        self.pool = ThreadPoolExecutor(WORKERS)
        self.coming = [f"layers.{layer}." for layer in range(len(config.blocks))]
        self.made: dict[str, Future[dict[str, Tensor]]] = {}
        self.waited = 0.0

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        started = time.perf_counter()
        while self.coming and len(self.made) < AHEAD:
            name = self.coming.pop(0)
            self.made[name] = self.pool.submit(self.source.tensors, name)
        found = self.made.pop(prefix).result() if prefix in self.made else self.source.tensors(prefix)
        self.waited += time.perf_counter() - started
        return found


class Stopwatch:
    """Seconds by step, what other steps take inside it left out."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.inside = [0.0]
        for module, name in STEPS:
            self.watch(f"squamata.{module}", name)

    def watch(self, module: str, name: str) -> None:
        *classes, last = name.split(".")
        owner: Any = importlib.import_module(module)
        for each in classes:
            owner = getattr(owner, each)
        setattr(owner, last, self.timed(getattr(owner, last), f"{module.removeprefix('squamata.')}.{name}"))

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                passed = time.perf_counter() - started
                self.seconds[label] += passed - self.inside.pop()
                self.calls[label] += 1
                self.inside[-1] += passed

        return call

    def show(self, layers: int) -> None:
        for label, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            print(f"   {label:36} {1e3 * seconds / layers:8.1f} ms a layer, {self.calls[label] / layers:8.1f} calls")


def timed_run(config: ModelConfig, recipe: Recipe, batches: list[Tensor]) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    source = MadeAhead(config)
    parts = QuantizedParts(source, recipe, batches, "cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    marks = []
    for _ in parts.each():
        torch.cuda.synchronize()
        marks.append(time.perf_counter() - started)
        if len(marks) in (2, 3, 5, 9) or len(marks) % 16 == 0:
            print(f"{len(marks)} parts: {marks[-1]:.2f} s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
                  flush=True)  # fmt: skip
    return {
        "seconds": marks[-1], "first_layer": marks[1] - marks[0], "ends": marks[0] + marks[-1] - marks[-2],
        "seconds_a_layer": (marks[-2] - marks[1]) / max(1, len(config.blocks) - 1), "waited_for_weights": source.waited,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(), "layers": len(config.blocks),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mamba2-2.7b", choices=sorted(SHAPES))
    parser.add_argument("--recipe", default="quamba2-w4a8")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0, help="only so many layers (0: all)")
    parser.add_argument("--where", action="store_true", help="say where the time goes; slower")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe, config = Recipe.read(arguments.recipe), SHAPES[arguments.shape]
    whole = len(config.blocks)
    if arguments.layers:
        config = config.model_copy(update={"blocks": config.blocks[: arguments.layers]})
    result: dict[str, Any] = {"shape": arguments.shape, "recipe": arguments.recipe, "layers_of_the_shape": whole,
                              "tokens": arguments.samples * arguments.length,
                              "device": torch.cuda.get_device_name()}  # fmt: skip
    if not arguments.no_check:
        result["codes_differing"] = check(recipe)
    stopwatch = Stopwatch() if arguments.where else None
    ids = torch.randint(config.vocab_size, (arguments.samples, arguments.length))
    result |= timed_run(config, recipe, list(ids.split(arguments.batch)))
    print(json.dumps(result, indent=1))
    if stopwatch is not None:
        stopwatch.show(len(config.blocks))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
