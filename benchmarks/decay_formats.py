"""Nothing but the scan's decay in few bits: KL and perplexity ratio to the float model, in parallel and decoding.

    python benchmarks/decay_formats.py --models MODELS/mamba1-24m MODELS/mamba2-24m --calibration pile.jsonl
        --text heldout.jsonl [--rows rows.jsonl] [--picture findings-decay.png]

Rows that ``--rows`` holds already are not measured again. Intervals are 95 % bootstrap intervals over documents; the
ratio is of perplexities on the same tokens, so that its interval is that of the pair.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from panels import Dot, Row, draw_panels, keep, kept_rows

import squamata
from squamata.evaluate.perplexity import Evaluation
from squamata.evaluate.uncertainty import ratio_interval
from squamata.run.model import Model
from squamata.spec.recipe import Recipe

EACH = "channel,state"  # Mamba-1; a Mamba-2 has one decay a head
ASYMMETRIC = {"symmetric": False}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("decay", {"bits": 8}),
    "int8 with zero point": ("decay", {"bits": 8} | ASYMMETRIC),
    "int8 with zero point, each": ("decay", {"bits": 8, "granularity": EACH} | ASYMMETRIC),
    "ltsq-fine 8": ("decay", {"bits": 8, "codec": "ltsq-fine"}),
    "dt A in int8 with zero point": ("log_decay", {"bits": 8} | ASYMMETRIC),
    "int6 with zero point": ("decay", {"bits": 6} | ASYMMETRIC),
    "ltsq-fine 6": ("decay", {"bits": 6, "codec": "ltsq-fine"}),
    "ltsq 5": ("decay", {"bits": 5, "codec": "ltsq"}),
    "ltsq-fine 5": ("decay", {"bits": 5, "codec": "ltsq-fine"}),
    "log2 5": ("decay", {"bits": 5, "codec": "log2"}),
    "dt A in log2 5": ("log_decay", {"bits": 5, "codec": "log2"}),
    "int4": ("decay", {"bits": 4}),
    "int4 with zero point": ("decay", {"bits": 4} | ASYMMETRIC),
    "int4 with zero point, each": ("decay", {"bits": 4, "granularity": EACH} | ASYMMETRIC),
    "ltsq 4": ("decay", {"bits": 4, "codec": "ltsq"}),
    "log2 4": ("decay", {"bits": 4, "codec": "log2"}),
    "dt A in int4 with zero point": ("log_decay", {"bits": 4} | ASYMMETRIC),
    "dt A in int4 with zero point, each": ("log_decay", {"bits": 4, "granularity": EACH} | ASYMMETRIC),
}


def quantized(folder: Path, name: str, calibration: Path, scratch: Path, samples: int) -> Model:
    """The float model with its decay in this format."""
    site, spec = FORMATS[name]
    kind = squamata.load(folder, "float").config.architecture
    if kind == "mamba2" and spec.get("granularity") == EACH:
        spec = spec | {"granularity": "head"}
    recipe = Recipe.from_mapping({"name": "decay", "rules": [{"site": f"*.mixer.{site}", "spec": spec}]})
    out = scratch / folder.name
    squamata.quantize(folder, recipe, out, calibration, samples=samples, length=256, force=True)
    return squamata.load(out)


def row_of(judged: Evaluation, plain: Evaluation) -> Row:
    """KL and perplexity ratio with their intervals."""
    more, tokens = judged.sums.nats - plain.sums.nats, judged.sums.tokens
    interval = ratio_interval(more, tokens)
    return {
        "kl": judged.kl,
        "kl_ci": judged.kl_ci,
        "ratio": math.exp(more.sum() / tokens.sum()),
        "ratio_ci": None if interval is None else [math.exp(end) for end in interval],
    }


def table(rows: list[Row]) -> str:
    """Markdown: a line a format, KL and ratio a model and mode."""
    columns = list(dict.fromkeys((row["model"], row["mode"]) for row in rows))
    lines = ["| decay | " + " | ".join(f"{model}, {mode}: KL | ratio" for model, mode in columns) + " |"]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for name in dict.fromkeys(row["format"] for row in rows):
        cells = [name]
        for column in columns:
            found = [row for row in rows if (row["model"], row["mode"]) == column and row["format"] == name]
            cells += [_interval(found[0], "kl", 5), _interval(found[0], "ratio", 4)] if found else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(row: Row, key: str, digits: int) -> str:
    ends = row[f"{key}_ci"]
    said = f"{row[key]:.{digits}f}"
    return said if ends is None else f"{said} ({ends[0]:.{digits}f}-{ends[1]:.{digits}f})"


def dots(rows: list[Row]) -> list[Dot]:
    """KL by format, one panel a model and mode; formats of the logarithm in a colour of their own."""
    return [
        Dot(
            panel=f"{row['model']}, {row['mode']}",
            name=row["format"],
            value=row["kl"],
            interval=row["kl_ci"] or (row["kl"], row["kl"]),
            colour="tab:orange" if "log" in row["format"] or "ltsq" in row["format"] else "tab:blue",
        )
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=[4096, 2048], metavar=("PARALLEL", "RECURRENT"))
    parser.add_argument("--only", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = kept_rows(options.rows)
    done = {(row["model"], row["format"]) for row in rows}
    for folder in options.models:
        wanted = [name for name in options.only if (folder.name, name) not in done]
        reference = squamata.load(folder)
        judge = {mode: {"window": 512, "max_tokens": count, "mode": mode}
                 for mode, count in zip(("parallel", "recurrent"), options.tokens, strict=True) if count}  # fmt: skip
        plain = {mode: squamata.evaluate(reference, options.text, **how) for mode, how in judge.items() if wanted}
        for name in wanted:
            with tempfile.TemporaryDirectory() as scratch:
                model = quantized(folder, name, options.calibration, Path(scratch), options.samples)
            for mode, how in judge.items():
                judged = squamata.evaluate(model, options.text, against=reference, **how)
                rows.append({"model": folder.name, "format": name, "mode": mode} | row_of(judged, plain[mode]))
                print(json.dumps(rows[-1]), flush=True)
                keep(rows[-1], options.rows)
    print(table(rows))
    if options.picture:
        draw_panels(dots(rows), options.picture, xscale="log")


if __name__ == "__main__":
    main()
