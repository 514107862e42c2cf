"""The accuracy table of docs/benchmarks.md: recipes x models, judged on two texts and LAMBADA.

    python benchmarks/accuracy.py --models MODELS/mamba1-24m MODELS/mamba2-24m --data DATA --out out/accuracy

Rows go to OUT/rows.jsonl as they are finished; a second call does what is missing and prints the table.
"""

from __future__ import annotations

import argparse
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
from panels import keep, kept_rows

import squamata
from squamata.evaluate import evaluate_lambada
from squamata.evaluate.size import bytes_by_part
from squamata.models.config import ModelConfig, parameter_shapes
from squamata.run.model import Model

RECIPES = (
    "float", "w8a8", "w8a8-channel", "quamba-w8a8", "quamba-w8a8-tied", "quamba-w8a8-float-head",
    "quamba-w8a8-static-state", "quamba-w8a8-like-upstream", "quamba2-w8a8", "quamba2-w8a8-like-upstream",
    "w4a8", "quamba-w4a8", "quamba2-w4a8", "quamba2-w4ax", "quamba-w4a4", "w4a16", "quamba-w4a16",
)  # fmt: skip
TEXTS = {"wikipedia": "wikipedia-heldout.jsonl", "wikitext2": "wikitext2-test.txt"}


def judge(model: Model, against: Model | None, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and fidelity on both texts in both modes, and LAMBADA."""
    row: dict[str, Any] = {}
    limits = {"parallel": arguments.max_tokens, "recurrent": arguments.recurrent_tokens}
    for text, file in TEXTS.items():
        for mode, limit in limits.items():
            result = squamata.evaluate(model, data / file, against, max_tokens=limit, mode=mode)
            row[f"{text} {mode}"] = {
                key: getattr(result, key)
                for key in ("perplexity", "perplexity_ci", "kl", "kl_ci", "top1_agreement", "tokens", "seconds")
            }
    lambada = evaluate_lambada(model, data / "lambada_openai.jsonl", limit=arguments.lambada)
    return row | {"lambada": {"accuracy": lambada.accuracy, "standard_error": lambada.accuracy_stderr}}


def run(folder: Path, recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: quantize, reload, judge."""
    out = arguments.out / f"{folder.name}-{recipe}"
    calibration = arguments.data / "pile-calibration-512.jsonl"
    made = squamata.quantize(folder, recipe, out, calibration, force=True)
    model = squamata.load(out)
    reference = None if recipe == "float" else squamata.load(folder)
    with torch.inference_mode():
        judged = judge(model, reference, arguments.data, arguments)
    return {
        "model": folder.name,
        "recipe": recipe,
        "quantization_seconds": made.seconds,
        "bits": 8 * bytes_by_part(model)["layers"] / layer_parameters(model.config),
        "bytes": bytes_by_part(model),
    } | judged


def layer_parameters(config: ModelConfig) -> int:
    """Numbers in the layers of the float model."""
    return sum(prod(shape) for name, shape in parameter_shapes(config).items() if name.startswith("layers."))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the float row of the same model and column."""
    lines = [
        "| model | recipe | MB (layers) | bits a weight | Wikipedia ppl (ratio), parallel | recurrent "
        "| WikiText-2 ppl (ratio), parallel | recurrent "
        "| KL Wikipedia par. / rec. | top-1 par. | LAMBADA % | quantize s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    floats = {row["model"]: row for row in rows if row["recipe"] == "float"}
    for row in rows:
        total, layers = row["bytes"]["total"] / 1e6, row["bytes"]["layers"] / 1e6
        cells = [row["model"], row["recipe"], f"{total:.1f} ({layers:.1f})", f"{row['bits']:.2f}"]
        for column in ("wikipedia parallel", "wikipedia recurrent", "wikitext2 parallel", "wikitext2 recurrent"):
            value = row[column]["perplexity"]
            cells.append(f"{value:.2f} ({value / floats[row['model']][column]['perplexity']:.4f})")
        kls = [row[f"wikipedia {mode}"]["kl"] or 0.0 for mode in ("parallel", "recurrent")]
        spread = row["wikipedia parallel"]["kl_ci"]
        half = "" if spread is None else f" ± {(spread[1] - spread[0]) / 2:.4f}"
        cells.append(f"{kls[0]:.4f}{half} / {kls[1]:.4f}")
        agreement = row["wikipedia parallel"]["top1_agreement"]
        cells.append("" if agreement is None else f"{100 * agreement:.1f}")
        cells.append(f"{100 * row['lambada']['accuracy']:.1f} ± {100 * row['lambada']['standard_error']:.1f}")
        cells.append(f"{row['quantization_seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--recurrent-tokens", type=int, default=4096)
    parser.add_argument("--lambada", type=int, default=500)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.out / "rows.jsonl"
    rows = kept_rows(store)
    for folder in arguments.models:
        for recipe in arguments.recipes:
            if any(row["model"] == folder.name and row["recipe"] == recipe for row in rows):
                continue
            started = time.perf_counter()
            rows.append(run(folder, recipe, arguments))
            keep(rows[-1], store)
            print(f"{folder.name} {recipe}: {time.perf_counter() - started:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
