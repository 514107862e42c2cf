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
from squamata.report.rows import read_details, read_rows, read_study, unpack_sums

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


def read(folder: Path, mode: str, main: str) -> dict[str, dict[Key, Entry]]:
    """model -> (name, text) -> entry, in the given mode; ``main``: the recipe that goes without saying."""
    losses: dict[str, dict[Key, list[tuple[float, UnitSums]]]] = {}
    for row in read_study(folder)[1] or read_rows(folder):  # not those of an earlier study
        details = read_details(folder, row["id"])
        for place, judged in enumerate(row["evaluations"]):
            sums = unpack_sums(details, place)
            if judged["mode"] != mode or judged["kl"] is None or sums is None:
                continue
            key = (name_of(row, main), judged["text"])
            losses.setdefault(row["model"], {}).setdefault(key, []).append((judged["kl"], sums))
    return {model: {key: entry_of(some) for key, some in found.items()} for model, found in sorted(losses.items())}


def name_of(row: dict[str, Any], main: str) -> str:
    """The variation's name; the recipe's as it is; both for a variation of another recipe than the main one."""
    recipe = str(row["recipe"]).rpartition("/")[2].removesuffix(".yaml")
    if row["override"] == "as it is":
        return recipe
    return str(row["override"]) if row["recipe"] == main else f"{recipe}: {row['override']}"


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
    if control.kl == 0:  # float
        return f" / {MARKS[nats.verdict]}"
    change = 100 * (entry.kl / control.kl - 1)
    change_words = (
        f"{change:+.{0 if abs(change) >= 1 else 1}f} %" if abs(change) < 1000 else f"x {entry.kl / control.kl:.0f}"
    )
    return f"{change_words if kl.verdict != 'not significant' else 'n. s.'} / {MARKS[nats.verdict]}"


def names_of(found: dict[str, dict[Key, Entry]], order: list[str]) -> list[str]:
    """Every name, in the study's order of variations."""
    names = dict.fromkeys(name for entries in found.values() for name, _ in entries)
    places = {name: number for number, name in enumerate(order)}
    return sorted(names, key=lambda name: places.get(name.rpartition(": ")[2], -1))


def table(found: dict[str, dict[Key, Entry]], mode: str, control: str | None, names: list[str]) -> str:
    """Markdown; for every model KL on the first text (interval) ± seeds, beside the control, perplexity; of further
    texts KL and perplexity, and the verdict on the latter."""
    texts = list(dict.fromkeys(text for entries in found.values() for _, text in entries))
    further = "".join(f" | {text}: KL, perplexity" for text in texts[1:])
    heads = [f"{model}: KL | KL / perplexity beside | perplexity{further}" for model in found]
    lines = [f"| {mode}, {texts[0]} | " + " | ".join(heads) + " |", "|---" * (1 + (2 + len(texts)) * len(found)) + "|"]
    for name in names:
        cells = [name]
        for entries in found.values():
            entry, against = entries.get((name, texts[0])), entries.get((control or "", texts[0]))
            cells += [entry.words(), beside(entry, against), f"{entry.perplexity:.2f}"] if entry else ["", "", ""]
            for text in texts[1:]:
                other, beside_it = entries.get((name, text)), entries.get((control or "", text))
                verdict = beside(other, beside_it).rpartition("/ ")[2] if other else ""
                cells.append(f"{other.kl:.5f}, {other.perplexity:.2f} ({verdict})" if other else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[Key, Entry]], path: Path, title: str, names: list[str]) -> None:
    """Bars of KL on a logarithmic axis, one group a row."""
    texts = dict.fromkeys(text for entries in found.values() for _, text in entries)
    keys = [(name, text) for name in names for text in texts]
    several = len({text for _, text in keys}) > 1
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.34 * len(keys)))
    height = 0.8 / len(found)
    for number, (model, entries_of) in enumerate(found.items()):
        places = [place + number * height for place, key in enumerate(keys) if key in entries_of]
        entries = [entries_of[key] for key in keys if key in entries_of]
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
    parser.add_argument("--texts", nargs="+", help="only these")
    parser.add_argument("--beside", metavar="NAME", help="the control")
    parser.add_argument("--only", metavar="PART", default="", help="names that hold this")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    path = arguments.folder / "study.json"
    study = json.loads(path.read_text())["study"] if path.is_file() else {}
    found = {
        model: {
            (name, text): entry
            for (name, text), entry in entries.items()
            if (arguments.only in name or name == arguments.beside) and text in (arguments.texts or [text])
        }
        for model, entries in read(arguments.folder, arguments.mode, study.get("recipes", [""])[0]).items()
    }
    names = names_of(found, [override["name"] for override in study.get("overrides", [])])
    print(table(found, arguments.mode, arguments.beside, names))
    if arguments.picture:
        draw(found, arguments.picture, f"{arguments.folder.name}, {arguments.mode}", names)


if __name__ == "__main__":
    main()
