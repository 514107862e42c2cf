"""Scales trained on a layer's output or on the model's logits, against those that are found: KL, a row each.

    python benchmarks/learned_scales.py --calibration pile.jsonl --text heldout.jsonl [--model bundled] [--seeds 0 1 2]
        [--settings "W8A8" "u 4 bits" "W4A8"] [--rows rows.jsonl] [--picture findings-learned.png]

All settings are quamba-w8a8 with something changed. A seed draws other calibration documents; the interval is that of a
paired bootstrap over the documents of the text, the seeds' rows joined; +- is the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from panels import Dot, Row, draw_panels, keep, kept_rows

from squamata.calibrate.tokens import sample
from squamata.evaluate.perplexity import evaluate
from squamata.evaluate.uncertainty import ratio_interval
from squamata.load.source import open_source
from squamata.models.checkpoint import Checkpoint
from squamata.parts import QuantizedParts
from squamata.pipeline import load
from squamata.run.model import Model
from squamata.spec.recipe import Recipe

PERCENTILE: dict[str, Any] = {"percentile": {"alpha": 0.9999}}
ALPHAS = {"alpha": [0.99, 0.999, 0.9999, 0.99999]}
SETTINGS: dict[str, tuple[str, int]] = {"W8A8": ("quamba-w8a8", 8), "u 4 bits": ("quamba-w8a8", 4), "W4A8": ("w4a8", 8)}
METHODS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "percentile 0.9999": (PERCENTILE, None),
    "mse": ("mse", None),
    "search by mse": ({"search": ["percentile", "mse"], "over": ALPHAS, "by": "mse"}, None),
    "search by kl (logits)": ({"search": ["percentile", "mse"], "over": ALPHAS, "by": "kl"}, None),
    "lsq, layer, from mse": ("mse", {"against": "layer"}),
    "lsq, logits, from mse": ("mse", {"against": "logits"}),
}


def recipe_of(setting: str, method: str, steps: int, length: int) -> Recipe:
    """The setting with this way to scales at u."""
    parent, bits = SETTINGS[setting]
    scale, tune = METHODS[method]
    rule = {"site": "*.mixer.u", "spec": {"bits": bits, "rounding": "half-away", "scale": scale}}
    mapping = {"name": "learned", "extends": parent, "rules": [rule], "calibration": {"length": length}}
    return Recipe.from_mapping(mapping | ({"tune": {"lsq": {"steps": steps} | tune}} if tune else {}))


def quantized(source: Any, recipe: Recipe, batches: list[torch.Tensor], tokenizer: Any) -> Model:
    """In memory."""
    parts = QuantizedParts(source, recipe, batches)
    return Model(Checkpoint.of_parts(parts.config, recipe, parts.each()), tokenizer=tokenizer)


def table(rows: list[Row]) -> str:
    """Markdown: a line a method, a column a setting; KL over all seeds, its interval, the spread of the seeds."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    lines = ["| scales | " + " | ".join(settings) + " | seconds |", "|---" * (len(settings) + 2) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells, seconds = [method], []
        for setting in settings:
            found = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
            seconds += [row["seconds"] for row in found]
            cells.append(_cell(found) if found else "")
        lines.append("| " + " | ".join(cells) + f" | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines)


def _joined(rows: list[Row]) -> tuple[float, tuple[float, float]]:
    """Mean KL and its interval over documents, every document with the sum of its seeds."""
    kl, tokens = (np.sum([row[key] for row in rows], axis=0) for key in ("kl_sums", "tokens"))
    mean = float(kl.sum() / tokens.sum())
    return mean, ratio_interval(kl, tokens) or (mean, mean)


def _cell(rows: list[Row]) -> str:
    mean, (low, high) = _joined(rows)
    each = [row["kl"] for row in rows]
    spread = f", ± {statistics.stdev(each):.5f}" if len(each) > 1 else ""
    return f"{mean:.5f} ({low:.5f}-{high:.5f}{spread})"


def dots(rows: list[Row]) -> list[Dot]:
    """KL by method, one panel a setting; a small dot a seed."""
    by_cell: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_cell.setdefault((row["setting"], row["method"]), []).append(row)
    return [
        Dot(setting, method, *_joined(found), each=[row["kl"] for row in found])
        for (setting, method), found in by_cell.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = kept_rows(options.rows)
    done = {(row["setting"], row["method"], row["seed"]) for row in rows}
    reference, source = load(options.model), open_source(options.model)
    for seed in options.seeds:
        settings = Recipe.read("quamba-w8a8").calibration.model_copy(
            update={"samples": options.samples, "length": options.length}
        )
        batches = sample(options.calibration, reference.tokenizer, settings, seed).batches()
        for setting in options.settings:
            for method in options.only:
                if (setting, method, seed) in done:
                    continue
                recipe = recipe_of(setting, method, options.steps, options.length)
                started = time.perf_counter()
                model = quantized(source, recipe, batches, reference.tokenizer)
                seconds = time.perf_counter() - started
                judged = evaluate(model, options.text, reference, window=1024, max_tokens=options.max_tokens)
                assert judged.sums.kl is not None
                rows.append({
                    "setting": setting, "method": method, "seed": seed, "kl": judged.kl, "seconds": seconds,
                    "perplexity": judged.perplexity, "kl_sums": judged.sums.kl.tolist(),
                    "tokens": judged.sums.tokens.tolist(),
                })  # fmt: skip
                print(f"{setting:10} {method:24} seed {seed}  {judged.kl:.6f}  {seconds:.0f} s", flush=True)
                keep(rows[-1], options.rows)
    print(table(rows))
    if options.picture:
        draw_panels(dots(rows), options.picture)


if __name__ == "__main__":
    main()
