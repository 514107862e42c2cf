"""Table and picture of a finding: KL with its interval, averaged over seeds, and how it stands beside a control.

python benchmarks/findings.py results/formats --beside int8 --picture docs/findings-formats.png

Intervals are 95 % bootstrap intervals over documents (of the mean over seeds); ± is the standard deviation over seeds.
*beside*: paired difference from the control over the same documents; n. s.: its interval holds zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from squamata.evaluate.perplexity import UnitSums, difference_of_sums
from squamata.evaluate.uncertainty import Interval, ratio_interval
from squamata.report.rows import read_details, unpack_sums

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Key = tuple[str, str]  # name, text
MARKS = {"better": "−", "worse": "+", "not significant": "n. s."}


@dataclass(frozen=True)
class Entry:
    """One variation of a model on a text, over its seeds."""

    sums: UnitSums
    kls: tuple[float, ...]

    @property
    def kl(self) -> float:
        return statistics.mean(self.kls)

    @property
    def interval(self) -> Interval:
        assert self.sums.kl is not None
        found = ratio_interval(self.sums.kl, self.sums.tokens)
        assert found is not None
        return found

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.sums.nats.sum() / self.sums.tokens.sum()))

    def words(self) -> str:
        spread = f" ± {statistics.stdev(self.kls):.5f}" if len(self.kls) > 1 else ""
        return f"{self.kl:.5f} ({self.interval[0]:.5f}-{self.interval[1]:.5f}){spread}"


def read(folder: Path, mode: str, text: str | None) -> dict[str, dict[Key, Entry]]:
    """model -> (name, text) -> entry, in the given mode."""
    losses: dict[str, dict[Key, list[tuple[float, UnitSums]]]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        details = read_details(folder, row["id"])
        for place, judged in enumerate(row["evaluations"]):
            sums = unpack_sums(details, place)
            if judged["mode"] != mode or judged["kl"] is None or sums is None or text not in (None, judged["text"]):
                continue
            key = (name_of(row), judged["text"])
            losses.setdefault(row["model"], {}).setdefault(key, []).append((judged["kl"], sums))
    return {model: {key: entry_of(some) for key, some in found.items()} for model, found in sorted(losses.items())}


def name_of(row: dict[str, Any]) -> str:
    recipe = row["recipe"].rpartition("/")[2].removesuffix(".yaml")
    return str(recipe) if row["override"] == "as it is" else str(row["override"])


def entry_of(some: list[tuple[float, UnitSums]]) -> Entry:
    """The seeds' losses of every document, averaged."""
    first = some[0][1]
    nats = np.mean([sums.nats for _, sums in some], axis=0)
    kl = np.mean([sums.kl for _, sums in some if sums.kl is not None], axis=0)
    return Entry(UnitSums(first.kind, first.tokens, nats, kl), tuple(kl for kl, _ in some))


def beside(entry: Entry, control: Entry | None) -> str:
    """KL's difference in percent, and the verdicts on KL and on perplexity."""
    if control is None or control is entry:
        return "control" if control is entry else ""
    kl, nats = (difference_of_sums(control.sums, entry.sums, measure) for measure in ("kl", "nats"))
    change = 100 * (entry.kl / control.kl - 1)
    change_words = f"{change:+.0f} %" if abs(change) < 1000 else f"x {entry.kl / control.kl:.0f}"
    return f"{change_words if kl.verdict != 'not significant' else 'n. s.'} / {MARKS[nats.verdict]}"


def keys_of(found: dict[str, dict[Key, Entry]], order: list[str]) -> list[Key]:
    """Every name and text, in the study's order of variations."""
    keys = dict.fromkeys(key for names in found.values() for key in names)
    return sorted(keys, key=lambda key: order.index(key[0]) if key[0] in order else -1)


def table(found: dict[str, dict[Key, Entry]], mode: str, control: str | None, order: list[str]) -> str:
    """Markdown: KL (interval) ± seeds, beside the control, perplexity; for every model."""
    keys = keys_of(found, order)
    several = len({text for _, text in keys}) > 1
    heads = [f"{model} KL | KL / perplexity beside | perplexity" for model in found]
    lines = [f"| {mode} | " + " | ".join(heads) + " |", "|---" * (1 + 3 * len(found)) + "|"]
    for key in keys:
        cells = [f"{key[0]}, {key[1]}" if several else key[0]]
        for names in found.values():
            entry = names.get(key)
            against = names.get((control, key[1])) if control else None
            cells += [entry.words(), beside(entry, against), f"{entry.perplexity:.2f}"] if entry else ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[Key, Entry]], path: Path, title: str, order: list[str]) -> None:
    """Bars of KL on a logarithmic axis, one group a row."""
    keys = keys_of(found, order)
    several = len({text for _, text in keys}) > 1
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.34 * len(keys)))
    height = 0.8 / len(found)
    for number, (model, names) in enumerate(found.items()):
        places = [place + number * height for place, key in enumerate(keys) if key in names]
        entries = [names[key] for key in keys if key in names]
        errors = [[e.kl - e.interval[0] for e in entries], [e.interval[1] - e.kl for e in entries]]
        axes.barh(places, [e.kl for e in entries], height, xerr=errors, label=model, error_kw={"lw": 0.8})
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
    parser.add_argument("--text", help="only this one")
    parser.add_argument("--beside", metavar="NAME", help="the control")
    parser.add_argument("--only", metavar="PART", help="names that hold this")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = read(arguments.folder, arguments.mode, arguments.text)
    if arguments.only:
        found = {
            model: {
                key: entry for key, entry in names.items() if arguments.only in key[0] or key[0] == arguments.beside
            }
            for model, names in found.items()
        }
    path = arguments.folder / "study.json"
    study = json.loads(path.read_text())["study"] if path.is_file() else {}
    order = [override["name"] for override in study.get("overrides", [])]
    print(table(found, arguments.mode, arguments.beside, order))
    if arguments.picture:
        draw(found, arguments.picture, f"{arguments.folder.name}, {arguments.mode}", order)


if __name__ == "__main__":
    main()
