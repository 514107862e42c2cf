"""Table and picture of a finding: one bar a row of a study, KL with its interval.

python benchmarks/findings.py results/formats --picture docs/findings-formats.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(folder: Path, mode: str) -> list[dict[str, Any]]:
    """One flat row for every row of the study and text, in the given mode; seeds apart."""
    found = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        for judged in row["evaluations"]:
            if judged["mode"] == mode and judged["kl"] is not None:
                recipe = row["recipe"].rpartition("/")[2].removesuffix(".yaml")
                name = recipe if row["override"] == "as it is" else row["override"]
                found.append({"model": row["model"], "name": name, "seed": row["seed"]} | judged)
    return found


def merged(rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """model -> (name, text) -> mean KL and perplexity over seeds, and the widest interval."""
    found: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault((row["name"], row["text"]), []).append(row)
    return {
        model: {
            key: {
                "kl": sum(row["kl"] for row in group) / len(group),
                "low": min(row["kl_ci"][0] for row in group),
                "high": max(row["kl_ci"][1] for row in group),
                "perplexity": sum(row["perplexity"] for row in group) / len(group),
            }
            for key, group in names.items()
        }
        for model, names in found.items()
    }


def table(found: dict[str, dict[tuple[str, str], dict[str, float]]], mode: str) -> str:
    """Markdown: KL (interval) and perplexity a model."""
    models = list(found)
    lines = [f"| {mode} | " + " | ".join(f"{model} KL (interval) | perplexity" for model in models) + " |"]
    lines.append("|---" * (1 + 2 * len(models)) + "|")
    keys = list(dict.fromkeys(key for names in found.values() for key in names))
    several = len({text for _, text in keys}) > 1
    for key in keys:
        cells = [f"{key[0]}, {key[1]}" if several else key[0]]
        for model in models:
            entry = found[model].get(key)
            text = f"{entry['kl']:.5f} ({entry['low']:.5f}-{entry['high']:.5f})" if entry else ""
            cells += [text, f"{entry['perplexity']:.2f}" if entry else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[tuple[str, str], dict[str, float]]], path: Path, title: str) -> None:
    """Bars of KL on a logarithmic axis, one group a row."""
    keys = list(dict.fromkeys(key for names in found.values() for key in names))
    several = len({text for _, text in keys}) > 1
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.34 * len(keys)))
    height = 0.8 / len(found)
    for number, (model, names) in enumerate(found.items()):
        places = [place + number * height for place, key in enumerate(keys) if key in names]
        entries = [names[key] for key in keys if key in names]
        errors = [[e["kl"] - e["low"] for e in entries], [e["high"] - e["kl"] for e in entries]]
        axes.barh(places, [e["kl"] for e in entries], height, xerr=errors, label=model, error_kw={"lw": 0.8})
    labels = [f"{name}, {text}" if several else name for name, text in keys]
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(keys))], labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("KL(float || quantized), nats a token")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", default="parallel", choices=("parallel", "recurrent"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = merged(read(arguments.folder, arguments.mode))
    print(table(found, arguments.mode))
    if arguments.picture:
        draw(found, arguments.picture, f"{arguments.folder.name}, {arguments.mode}")


if __name__ == "__main__":
    main()
