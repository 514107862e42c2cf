"""Quantization on a GPU: seconds and peak memory of a whole recipe on random weights of a named shape.

    python benchmarks/gpu_quantize.py --shape mamba2-2.7b --recipe quamba2-w4a8 --samples 512 --length 512

Checked first on the bundled model with ``w4a8``: CPU and GPU give the same codes but for ties (at most 1e-3). What
is timed is compared too, but not judged by it: channels of nearly equal size may change places where sums are
rounded differently, which the rotation spreads over a whole layer, and with GPTQ a tie that falls the other way moves
what later columns make up for. ``--layers N``: the first N layers only, seconds a layer.
The result is made layer by layer and dropped; writing it is not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from squamata.kernels.qtensor import QTensor
from squamata.load.hub import bundled
from squamata.load.random_model import RandomSource
from squamata.load.source import open_source
from squamata.models.config import SHAPES
from squamata.parts import QuantizedParts
from squamata.spec.recipe import Recipe

PLAIN, MOST_DIFFERING = "w4a8", 1e-3  # the same rotations and grids, rounded to nearest, nothing reordered


def compared(recipe: Recipe) -> tuple[float, float, dict[str, float]]:
    """The bundled model on CPU and GPU: fraction of weight codes that differ, relative distance of the weights, and
    the fractions of the tensors that differ most."""
    source = open_source(bundled())
    ids = torch.randint(source.config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
    made = []
    for device in ("cpu", "cuda"):
        parts = QuantizedParts(source, recipe, [ids], device)
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
    named = dict(sorted(worst.items(), key=lambda item: -item[1])[:6])
    return different / total, (distance / size) ** 0.5, named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mamba2-2.7b", choices=sorted(SHAPES))
    parser.add_argument("--recipe", default="quamba2-w4a8")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0, help="only so many layers (0: all)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe, config = Recipe.read(arguments.recipe), SHAPES[arguments.shape]
    whole = len(config.blocks)
    if arguments.layers:
        config = config.model_copy(update={"blocks": config.blocks[: arguments.layers]})
    nearest, _, worst = compared(Recipe.read(PLAIN))
    print(f"where they differ most, {PLAIN}:", worst, flush=True)
    apart, distance, _ = compared(recipe)
    print(f"bundled model, CPU and GPU: {nearest:.2e} of codes differ with {PLAIN}, {apart:.2e} with the recipe "
          f"itself; distance of the weights {distance:.2e}", flush=True)  # fmt: skip
    if nearest > MOST_DIFFERING:
        raise SystemExit("GPU and CPU disagree: nothing is timed")
    ids = torch.randint(config.vocab_size, (arguments.samples, arguments.length))
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    reading = 0.0
    parts = QuantizedParts(RandomSource(config), recipe, list(ids.split(arguments.batch)), "cuda")
    tensors_of = parts.source.tensors

    def timed(prefix: str = "") -> dict[str, torch.Tensor]:
        nonlocal reading
        begun = time.perf_counter()
        found = tensors_of(prefix)
        reading += time.perf_counter() - begun
        return found

    object.__setattr__(parts.source, "tensors", timed)  # making random weights is not quantization
    marks = []
    for _ in parts.each():
        torch.cuda.synchronize()
        marks.append(time.perf_counter() - started - reading)
        if len(marks) in (2, 3, 9):
            print(f"{len(marks)} parts: {marks[-1]:.1f} s", flush=True)
    result = {
        "shape": arguments.shape, "recipe": arguments.recipe, "tokens": ids.numel(), "seconds": marks[-1],
        "seconds_a_layer": (marks[-2] - marks[1]) / max(1, len(marks) - 3), "making_random_weights_seconds": reading,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name(),
        "codes_differing_from_cpu": nearest, "codes_differing_as_rounded": apart, "weights_apart": distance,
        "layers": len(config.blocks), "layers_of_the_shape": whole,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
