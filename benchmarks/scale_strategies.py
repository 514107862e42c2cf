"""Scale strategies compared on one model: KL to the float model and seconds to quantize, a row each.

    python benchmarks/scale_strategies.py --calibration pile.jsonl --text heldout.jsonl [--model bundled] [--bits 8]

The recipe is quamba-w8a8 with the strategy changed at ``*.mixer.u`` alone (``u``) and at all static activation sites
(``all``). KL is KL(float || quantized) in nats a token with its bootstrap interval over documents; seconds are for
reading, calibrating and quantizing, all strategies in one process that has quantized once before.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from squamata.calibrate.tokens import sample
from squamata.evaluate.perplexity import evaluate
from squamata.load.source import open_source
from squamata.models.checkpoint import Checkpoint
from squamata.parts import QuantizedParts
from squamata.pipeline import load
from squamata.run.model import Model
from squamata.spec.recipe import Recipe

PERCENTILE = {"percentile": {"alpha": 0.9999}}
CANDIDATES = ["minmax", *({"percentile": {"alpha": alpha}} for alpha in (0.999, 0.9999, 0.99999)), "mse"]
STRATEGIES: dict[str, Any] = {
    "minmax": "minmax",
    **{f"percentile {alpha}": {"percentile": {"alpha": alpha}} for alpha in (0.999, 0.9995, 0.9999, 0.99999)},
    "percentile 0.9999, ema 0.01": {"percentile": {"alpha": 0.9999, "ema": 0.01}},
    "percentile 0.9999, ema 0.1, warm-up": {"percentile": {"ema": 0.1, "warmup": {5: 0.5, 10: 0.2}}},
    "mse": "mse",
    "lnorm 2.4": "lnorm",
    "aciq": "aciq",
    "entropy": "entropy",
    "outlier_aware": "outlier_aware",
    "search by mse": {"search": {"over": CANDIDATES, "by": "mse"}},
    "search by codes": {"search": {"over": CANDIDATES, "by": "codes"}},
    "lsq from percentile 0.9999": PERCENTILE,
}
ACTIVATIONS = ("in", "z", "x", "B", "C", "dt", "B_conv", "C_conv", "out")


def recipe_with(scale: Any, where: str, bits: int, tune: bool) -> Recipe:
    """quamba-w8a8 with this strategy at u, or everywhere."""
    u = {"bits": bits, "rounding": "half-away", "scale": scale}
    rules = [{"site": "*.mixer.u", "spec": u}]
    if where == "all":
        rules += [{"site": f"*.mixer.{site}", "spec": {"bits": bits, "scale": scale}} for site in ACTIVATIONS]
    mapping = {"name": "compared", "extends": "quamba-w8a8", "rules": rules}
    return Recipe.from_mapping(mapping | ({"tune": {"lsq": {}}} if tune else {}))


def quantized(source: Any, recipe: Recipe, batches: list[torch.Tensor], tokenizer: Any) -> Model:
    parts = QuantizedParts(source, recipe, batches)
    return Model(Checkpoint.of_parts(parts.config, recipe, parts.each()), tokenizer=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--where", nargs="+", default=["u", "all"], choices=["u", "all"])
    parser.add_argument("--only", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES), metavar="STRATEGY")
    options = parser.parse_args()
    reference, source = load(options.model), open_source(options.model)
    settings = Recipe.read("quamba-w8a8").calibration.model_copy(update={"samples": options.samples})
    batches = sample(options.calibration, reference.tokenizer, settings, seed=0).batches()
    print(f"{'strategy':38} {'where':5} {'KL':>9} {'95 % interval':>21} {'perplexity':>10} {'seconds':>8}")
    quantized(source, Recipe.read("quamba-w8a8"), batches, reference.tokenizer)  # compiles
    for where in options.where:
        for name in options.only:
            scale = STRATEGIES[name]
            recipe = recipe_with(scale, where, options.bits, tune=name.startswith("lsq"))
            started = time.perf_counter()
            model = quantized(source, recipe, batches, reference.tokenizer)
            seconds = time.perf_counter() - started
            found = evaluate(model, options.text, reference, window=1024, max_tokens=options.max_tokens)
            interval = "-" if found.kl_ci is None else f"{found.kl_ci[0]:.6f}..{found.kl_ci[1]:.6f}"
            row = f"{name:38} {where:5} {found.kl:9.6f} {interval:>21} {found.perplexity:10.3f} {seconds:8.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
