"""What benchmarks share: rows of JSON kept in a file, and a picture of values with their intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from squamata.text import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


def kept_rows(path: Path | None) -> list[Row]:
    """The rows of a file, one a line, without what a killed run left of one; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path and path.is_file() else []


def keep(row: Row, path: Path | None) -> None:
    """Append a row to the file, if one is given."""
    if path:
        lines = [json.dumps(each) + "\n" for each in (*kept_rows(path), row)]
        write_whole(path, "".join(lines))


@dataclass(frozen=True)
class Dot:
    """A value in a panel, at the height of its name, with its interval; ``each``: small dots, such as one a seed."""

    panel: str
    name: str
    value: float
    interval: tuple[float, float]
    each: Sequence[float] = ()
    colour: str = "tab:blue"


def draw_panels(dots: Sequence[Dot], path: Path, xscale: str = "linear") -> None:
    """KL by name, the first on top, a panel beside the other; saved as a picture."""
    titles, names = (list(dict.fromkeys(getattr(dot, key) for dot in dots)) for key in ("panel", "name"))
    size = (3 + 3 * len(titles), 1.4 + 0.24 * len(names))
    figure, panels = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False)
    for axes, title in zip(panels[0], titles, strict=True):
        for dot in (dot for dot in dots if dot.panel == title):
            place, (low, high) = -names.index(dot.name), dot.interval
            error = [[max(0.0, dot.value - low)], [max(0.0, high - dot.value)]]
            axes.errorbar(dot.value, place, xerr=error, marker="o", capsize=3, color=dot.colour)
            axes.plot(dot.each, [place - 0.2] * len(dot.each), ".", color="grey")
        axes.set_xscale(xscale)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("KL to float, nats a token")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks([-place for place in range(len(names))], names, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
