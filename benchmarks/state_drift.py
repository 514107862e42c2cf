"""How the state's precision shows with the distance decoded: KL to the float state by position, in long sequences.

    python benchmarks/state_drift.py --model MODEL --text wikitext2-test.txt --calibration pile.jsonl --tokens 16384

Everything but the state is in float, so that nothing else is seen. The same tokens go one by one through the model with
a float state and through each format; the state is rounded at every step. ``--sequences N``: the text's first N
stretches of so many tokens, each from an empty state. Medians would hide bursts: bins give means and the standard error
over blocks of 128 tokens; the first row says what the model with the float state itself loses there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import squamata
from squamata.models.lm import Cache
from squamata.run.model import Model
from squamata.spec.recipe import Recipe
from squamata.text import read_documents

PERCENTILE = {"percentile": {"alpha": 0.9995}}
FORMATS: dict[str, dict[str, Any]] = {
    "int8 run-time (head, channel)": {"bits": 8, "granularity": "channel", "dynamic": True},
    "int6 run-time (head, channel)": {"bits": 6, "granularity": "channel", "dynamic": True},
    "int8 run-time, stochastic": {"bits": 8, "granularity": "channel", "dynamic": True, "rounding": "stochastic"},
    "int4 run-time (head, channel)": {"bits": 4, "granularity": "channel", "dynamic": True},
    "int4 run-time, stochastic": {"bits": 4, "granularity": "channel", "dynamic": True, "rounding": "stochastic"},
    "int8 static, percentile 0.9995": {"bits": 8, "rounding": "half-away", "scale": PERCENTILE},
    "int8 static 0.9995, stochastic": {"bits": 8, "rounding": "stochastic", "scale": PERCENTILE},
    "int8 static, maximum": {"bits": 8, "rounding": "half-away"},
    "int8 static (head, channel), maximum": {"bits": 8, "granularity": "channel"},
    "int8 static, Quamba2's groups": {"bits": 8, "granularity": "index,state"},  # 4 x 4 groups x state, Mamba-2 alone
}
HALVES = {"float16": False, "float16, stochastic": True}  # the float model, whose state is rounded after every token
BLOCK = 128


def models(folder: Path, calibration: Path, scratch: Path, wanted: list[str]) -> dict[str, Model]:
    """The float model, and one a wanted state format."""
    made = {"float": squamata.load(folder)}
    made |= {name: squamata.load(folder) for name in HALVES if name in wanted}
    for name in wanted:
        spec = FORMATS.get(name)
        if spec is None:
            continue
        grouped = ["reorder"] if spec.get("granularity") == "index,state" else []
        if grouped and "mamba1" in made["float"].config.blocks:
            continue
        rules = [{"site": "*.mixer.state", "spec": spec}]
        recipe = Recipe.from_mapping({"name": "state", "rules": rules, "transforms": grouped})
        out = scratch / str(len(made))
        squamata.quantize(folder, recipe, out, calibration, samples=32)
        made[name] = squamata.load(out)
    return made


@dataclass(frozen=True)
class Traces:
    """By position: losses of the float model (nats) and, of every other, KL to it and the difference of the losses."""

    nats: Tensor
    kls: dict[str, Tensor]
    differences: dict[str, Tensor]


def round_to_half(state: Tensor, stochastic: bool) -> Tensor:
    """A float32 state in float16's values: the nearest, or one of the neighbours with the fraction's probability."""
    if not stochastic:
        return state.half().float()
    exponent = torch.frexp(state).exponent - 1
    step = torch.ldexp(torch.ones_like(state), exponent.clamp_min(-14) - 10)  # 10 bits; subnormal below 2^-14
    return (torch.floor(state / step + torch.rand_like(state)) * step).clamp(-65504, 65504)


def step(name: str, model: Model, token: Tensor, cache: Cache) -> Tensor:
    """Logits (V,) float64 after one more token; the state is rounded where the recipe cannot say so."""
    logits = model.step(token[None], cache)[0].double()
    if name in HALVES:
        for layer in cache:
            layer.state.copy_(round_to_half(layer.state, HALVES[name]))
    return logits


@torch.no_grad()
def trace(every: dict[str, Model], ids: Tensor) -> Traces:
    """One sequence through all models, token by token, side by side; ``every["float"]`` is what they are held to."""
    caches = {name: model.new_cache() for name, model in every.items()}
    others = [name for name in every if name != "float"]
    nats: list[float] = []
    kls: dict[str, list[float]] = {name: [] for name in others}
    differences: dict[str, list[float]] = {name: [] for name in others}
    for token, following in track(list(itertools.pairwise(ids)), "decoding", console=Console(stderr=True)):
        logits = {name: step(name, model, token, caches[name]) for name, model in every.items()}
        p = logits["float"].log_softmax(-1)
        nats.append(float(-p[following]))
        for name in others:
            q = logits[name].log_softmax(-1)
            kls[name].append(float((p.exp() * (p - q)).sum()))
            differences[name].append(float(p[following] - q[following]))
    tensors = ({name: torch.tensor(values) for name, values in some.items()} for some in (kls, differences))
    return Traces(torch.tensor(nats), *tensors)


def binned(sequences: list[Tensor], edges: list[int]) -> list[tuple[float, float]]:
    """Mean and standard error of its blocks, between the edges, of all sequences together."""
    found = []
    for start, stop in itertools.pairwise(edges):
        blocks = torch.stack([block.mean() for values in sequences for block in values[start:stop].split(BLOCK)])
        found.append((float(blocks.mean()), float(blocks.std() / math.sqrt(len(blocks)))))
    return found


def summary(traces: list[Traces], edges: list[int]) -> dict[str, Any]:
    """Means and standard errors between the edges, and perplexities over everything."""
    losses = torch.cat([each.nats for each in traces])
    formats = {}
    for name in traces[0].kls:
        ratio = math.exp(float(torch.cat([each.differences[name] for each in traces]).mean()))
        formats[name] = {"kl": binned([each.kls[name] for each in traces], edges), "perplexity_ratio": ratio}
    nats = binned([each.nats for each in traces], edges)
    spans = [f"{start} - {stop}" for start, stop in itertools.pairwise(edges)]
    return {"spans": spans, "float": {"nats": nats, "perplexity": math.exp(float(losses.mean()))}, "formats": formats}


def show(found: dict[str, Any]) -> None:
    """The table in Markdown."""
    print(f"| state | {' | '.join(f'KL {span}' for span in found['spans'])} | perplexity ratio |")
    print("|---" * (len(found["spans"]) + 2) + "|")
    cells = " | ".join(f"{mean:.2f} ± {error:.2f} nats lost" for mean, error in found["float"]["nats"])
    print(f"| float (perplexity {found['float']['perplexity']:.1f}) | {cells} | 1 |")
    for name, row in found["formats"].items():
        cells = " | ".join(f"{mean:.5f} ± {error:.5f}" for mean, error in row["kl"])
        print(f"| {name} | {cells} | {row['perplexity_ratio']:.4f} |")


def draw(found: dict[str, Any], path: Path) -> None:
    """KL by position, one line a format."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for name, row in found["formats"].items():
        means, errors = zip(*row["kl"], strict=True)
        axes.errorbar(found["spans"], means, errors, marker="o", capsize=3, label=name)
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
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--formats", nargs="+", metavar="NAME", choices=[*HALVES, *FORMATS], help="these alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    edges = [0, 1024, *(2**power for power in range(12, 20) if 2**power < arguments.tokens), arguments.tokens - 1]
    with tempfile.TemporaryDirectory() as scratch:
        wanted = arguments.formats or [*HALVES, *FORMATS]
        every = models(arguments.model, arguments.calibration, Path(scratch), wanted)
    text = "\n".join(read_documents(arguments.text))
    ids = torch.tensor(every["float"].tokenizer.encode(text)[: arguments.tokens * arguments.sequences])
    if len(ids) < arguments.tokens * arguments.sequences:
        raise SystemExit(f"{arguments.text} has {len(ids)} tokens: ask for fewer or shorter sequences")
    traces = [trace(every, sequence) for sequence in ids.split(arguments.tokens)]
    found = summary(traces, edges)
    show(found)
    if arguments.picture:
        draw(found, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
