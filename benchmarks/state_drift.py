"""How the state's precision shows with the distance decoded: KL to the float state by position, one long sequence.

    python benchmarks/state_drift.py --model MODEL --text wikitext2-test.txt --calibration pile.jsonl --tokens 16384

Everything but the state is in float, so that nothing else is seen. The same tokens go one by one through the model with
a float state and through each format; the state is rounded at every step. Medians would hide bursts: bins give means
and the standard error over blocks of 128 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import squamata
from squamata.run.model import Model
from squamata.spec.recipe import Recipe
from squamata.text import read_documents

PERCENTILE = {"percentile": {"alpha": 0.9995}}
FORMATS: dict[str, dict[str, Any]] = {
    "int8 run-time (head, channel)": {"bits": 8, "granularity": "channel", "dynamic": True},
    "int6 run-time (head, channel)": {"bits": 6, "granularity": "channel", "dynamic": True},
    "int4 run-time (head, channel)": {"bits": 4, "granularity": "channel", "dynamic": True},
    "int8 static, percentile 0.9995": {"bits": 8, "rounding": "half-away", "scale": PERCENTILE},
    "int8 static, maximum": {"bits": 8, "rounding": "half-away"},
}
BLOCK = 128


def models(folder: Path, calibration: Path, scratch: Path) -> dict[str, Model]:
    """The float model, and one a state format."""
    made = {"float": squamata.load(folder)}
    for name, spec in FORMATS.items():
        recipe = Recipe.from_mapping({"name": "state", "rules": [{"site": "*.mixer.state", "spec": spec}]})
        out = scratch / str(len(made))
        squamata.quantize(folder, recipe, out, calibration, samples=32)
        made[name] = squamata.load(out)
    return made


@torch.no_grad()
def divergences(float_model: Model, other: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL (nats) and the difference of the losses at every token after the first."""
    kls, losses = [], []
    caches = float_model.new_cache(), other.new_cache()
    for token, following in itertools.pairwise(ids):
        p = float_model.step(token[None], caches[0])[0].double().log_softmax(-1)
        q = other.step(token[None], caches[1])[0].double().log_softmax(-1)
        kls.append(float((p.exp() * (p - q)).sum()))
        losses.append(float(p[following] - q[following]))
    return torch.tensor(kls), torch.tensor(losses)


def binned(values: torch.Tensor, edges: list[int]) -> list[tuple[float, float]]:
    """Mean and standard error of its blocks, between the edges."""
    found = []
    for start, stop in itertools.pairwise(edges):
        blocks = torch.stack([block.mean() for block in values[start:stop].split(BLOCK)])
        found.append((float(blocks.mean()), float(blocks.std() / math.sqrt(len(blocks)))))
    return found


def draw(rows: dict[str, Any], path: Path) -> None:
    """KL by position, one line a format."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for name, row in rows.items():
        means, errors = zip(*row["kl"], strict=True)
        axes.errorbar(row["spans"], means, errors, marker="o", capsize=3, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("tokens decoded")
    axes.set_ylabel("KL(float state || quantized state), nats")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    edges = [0, 1024, *(2**power for power in range(12, 20) if 2**power < arguments.tokens), arguments.tokens - 1]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        every = models(arguments.model, arguments.calibration, Path(scratch))
    reference = every.pop("float")
    text = "\n".join(read_documents(arguments.text))
    ids = torch.tensor(reference.tokenizer.encode(text)[: arguments.tokens])
    spans = [f"{start} - {stop}" for start, stop in itertools.pairwise(edges)]
    print(f"| state | {' | '.join(f'KL {span}' for span in spans)} | perplexity ratio |")
    print("|---" * (len(spans) + 2) + "|")
    for name, model in every.items():
        kls, losses = divergences(reference, model, ids)
        bins = binned(kls, edges)
        rows[name] = {"kl": bins, "spans": spans, "perplexity_ratio": math.exp(float(losses.mean()))}
        cells = " | ".join(f"{mean:.5f} ± {error:.5f}" for mean, error in bins)
        print(f"| {name} | {cells} | {rows[name]['perplexity_ratio']:.4f} |", flush=True)
    if arguments.picture:
        draw(rows, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
