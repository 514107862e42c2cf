"""Cost against length: prefill time is linear, decode time and memory do not depend on it.

python benchmarks/length.py --shape mamba2-130m --recipe quamba-w8a8
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from squamata.pipeline import random_model
from squamata.run.model import Model


def measure(model: Model, length: int, repeats: int) -> tuple[float, float, int]:
    """(prefill ms, ms a token decoded after it, bytes of the cache), medians."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    prefills, decodes = [], []
    for _ in range(repeats):
        cache = model.new_cache()
        start = time.perf_counter()
        model.forward(ids, cache, last_only=True)
        prefills.append(1e3 * (time.perf_counter() - start))
        for token in ids[0, :20]:
            start = time.perf_counter()
            model.step(token[None], cache)
            decodes.append(1e3 * (time.perf_counter() - start))
    return statistics.median(prefills), statistics.median(decodes), sum(layer.nbytes for layer in cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mamba2-130m")
    parser.add_argument("--recipe", default="quamba-w8a8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model = random_model(arguments.shape, arguments.recipe)
    print(f"{arguments.shape}, {arguments.recipe}, {torch.get_num_threads()} threads\n")
    print("| prompt | prefill ms | us a token | decode ms a token | cache MB |\n|---|---|---|---|---|")
    with torch.inference_mode():
        measure(model, 64, 1)
        for length in arguments.lengths:
            prefill, decode, memory = measure(model, length, arguments.repeats)
            print(f"| {length} | {prefill:.0f} | {1e3 * prefill / length:.0f} | {decode:.2f} | {memory / 1e6:.2f} |")


if __name__ == "__main__":
    main()
