"""Pictures of a study, as plotly figures: fronts, differences with their intervals, heat maps."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import UnitSums
from squamata.report.compare import SMALLEST_KL, Comparison, Measure, Row, paired
from squamata.report.labels import logarithmic, place_names
from squamata.report.plan import AS_IT_IS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INSTALL = "pip install 'squamata[studies]'"
COLOURS = ("#2a7f62", "#c8792b", "#4a6fa5", "#9b4a75", "#7a8b3c", "#5b6770", "#b5493b", "#3f8f9f")
DASHES = ("solid", "dash", "dot", "dashdot")  # once the colours are used up
FAINT, INK, GRID = "#9aa5ab", "#26323a", "#e6eaec"
VERDICTS = {"better": COLOURS[0], "worse": COLOURS[6], "not significant": FAINT}
SCALE = [[0.0, "#f6f8f7"], [0.35, "#a9d1c1"], [0.7, "#2a7f62"], [1.0, "#12372a"]]


class Cost(NamedTuple):
    """A cost as it is drawn: what it is called, and what a row's number of it is divided by."""

    words: str
    unit: float


SIZE = Cost("stored size, MB", 1e6)
CHIP = {  # figures of the hardware room that are costs
    "sram_mm2": Cost("SRAM for the scales of u, mm²", 1.0),
    "energy_per_token_nj": Cost("energy a token, mJ", 1e6),
    "dram_bytes_per_token": Cost("DRAM traffic a token, MB", 1e6),
}


def require_plotly() -> None:
    """SquamataError if pictures cannot be made here."""
    if importlib.util.find_spec("plotly") is None:
        raise SquamataError(f"pictures need the library 'plotly': {INSTALL}")


def figure(title: str, height: int = 420, **layout: Any) -> Figure:
    """An empty figure in the house style."""
    from plotly.graph_objects import Figure

    made = Figure()
    made.update_layout(
        title={"text": title, "font": {"size": 15, "color": INK}, "x": 0, "xanchor": "left", "xref": "container"},
        template="plotly_white",
        colorway=COLOURS,
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        height=height,
        margin={"l": 70, "r": 20, "t": 50, "b": 55},
        legend={"orientation": "h", "y": -0.18, "x": 0},
        hoverlabel={"align": "left"},
        **layout,
    )
    made.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    made.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    return made


def label(row: Row) -> str:
    """Recipe and override, and the seed where it is not 0; of a recipe's file its name alone."""
    recipe = PurePath(row["recipe"]).stem if row["recipe"].endswith((".yaml", ".yml")) else row["recipe"]
    name = recipe if row["override"] == AS_IT_IS else f"{recipe}, {row['override']}"
    return name if row["seed"] == 0 else f"{name}, seed {row['seed']}"


def models_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def pareto(rows: Sequence[Row], cost: str, quality: str) -> Figure:
    """Quality (``perplexity`` or ``kl``) against a cost, a colour a model; the line joins rows that no other beats.

    ``cost``: ``bytes`` (in MB) or one of ``CHIP``. Rows without the figure are left out.
    """
    word = {"perplexity": "perplexity", "kl": "KL to the float model, nats a token"}[quality]
    against = CHIP.get(cost, SIZE).words
    made = figure(f"{word.partition(',')[0]} against {against.partition(',')[0]}", hovermode="closest")
    every: list[tuple[float, float]] = []
    named: list[tuple[int, str, str]] = []  # place among all points, words, colour
    for number, model in enumerate(models_of(rows)):
        colour = COLOURS[number % len(COLOURS)]
        points = [(_cost(row, cost), row) for row in rows if row["model"] == model and _known(row, cost, quality)]
        if points:
            _add_points(made, model, points, quality, colour)
            front = _add_front(made, model, points, quality, colour)
            named += [(len(every) + place, label(points[place][1]), colour) for place in front]
            every += [(at, float(np.log10(row[quality])) if quality == "kl" else row[quality]) for at, row in points]
    _add_names(made, every, named)
    made.update_xaxes(title=against)
    made.update_yaxes(title=word, **(logarithmic([10**height for _, height in every]) if quality == "kl" else {}))
    return made


def _known(row: Row, cost: str, quality: str) -> bool:
    if quality == "kl" and (row["kl"] is None or row["kl"] <= SMALLEST_KL):
        return False
    return cost == "bytes" or cost in row.get("hardware", {})


def _cost(row: Row, cost: str) -> float:
    return float(row["bytes"]["total"] / SIZE.unit if cost == "bytes" else row["hardware"][cost] / CHIP[cost].unit)


def _add_points(made: Figure, model: str, points: Sequence[tuple[float, Row]], quality: str, colour: str) -> None:
    values = [row[quality] for _, row in points]
    bounds = [row["evaluations"][0][f"{quality}_ci"] or (row[quality], row[quality]) for _, row in points]
    made.add_scatter(
        x=[cost for cost, _ in points],
        y=values,
        mode="markers",
        name=model,
        legendgroup=model,
        marker={"size": 10, "color": colour, "line": {"width": 1, "color": "white"}},
        error_y={
            "type": "data",
            "array": [high - value for (_, high), value in zip(bounds, values, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(bounds, values, strict=True)],
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        customdata=[[label(row)] for _, row in points],
        hovertemplate="<b>%{customdata[0]}</b><br>%{x:.4g}, %{y:.5g}<extra>" + model + "</extra>",
    )


def _add_front(made: Figure, model: str, points: Sequence[tuple[float, Row]], quality: str, colour: str) -> list[int]:
    """A line through the points that no other beats; their places."""
    front = pareto_front([(cost, row[quality]) for cost, row in points])
    made.add_scatter(
        x=[points[place][0] for place in front],
        y=[points[place][1][quality] for place in front],
        mode="lines",
        line={"color": colour, "dash": "dot", "width": 1.5, "shape": "hv"},
        legendgroup=model,
        showlegend=False,
        hoverinfo="skip",
    )
    return front


def _add_names(made: Figure, points: Sequence[tuple[float, float]], named: Sequence[tuple[int, str, str]]) -> None:
    """Names of points beside them, as far as there is room: the mouse tells the others."""
    places = place_names(points, [(number, words) for number, words, _ in named])
    for (number, words, colour), place in zip(named, places, strict=True):
        if place is not None:
            side = {"xanchor": place.xanchor, "yanchor": place.yanchor, **place.shift, "showarrow": False}
            x, y = points[number]
            made.add_annotation(x=x, y=y, text=words, font={"size": 11, "color": colour}, **side)


def upright(made: Figure, x: float, text: str, colour: str, logarithmic: bool = False) -> None:
    """A dotted line across the figure, named at its top."""
    made.add_vline(x, line={"color": colour, "dash": "dot", "width": 1.5})
    at = float(np.log10(x)) if logarithmic else x
    style = {"yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 11, "color": colour}}
    made.add_annotation(x=at, y=1, text=text, **style)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point equals or beats in both coordinates (smaller is better), by the first
    coordinate; of equal points the first."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (*points[place], place)):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


def differences(
    rows: Sequence[Row], compared: Mapping[str, Comparison], measure: Measure = "nats", of: str = ""
) -> Figure:
    """Perplexity (or KL) of every row beside its baseline, in percent, with the paired interval; grey: not significant.

    ``of``: what it was judged on, for the title.
    """
    percents = [(row, compared[row["id"]].percent) for row in rows]
    shown = [(row, percent[0], percent[1]) for row, percent in percents if percent and percent[1]]
    word = {"nats": "perplexity", "kl": "KL"}[measure]
    title = f"{of}{': ' if of else ''}{word} beside the baseline, paired (grey: not significant)"
    made = figure(title, height=140 + 26 * len(shown), showlegend=False)
    several = len(models_of(rows)) > 1
    for row, middle, (low, high) in shown:
        found = compared[row["id"]]
        colour = VERDICTS.get(found.verdict, FAINT)
        name = f"{row['model']}: {label(row)}" if several else label(row)
        made.add_scatter(
            x=[middle],
            y=[name],
            mode="markers",
            marker={"size": 9, "color": colour},
            error_x={"type": "data", "array": [high - middle], "arrayminus": [middle - low], "color": colour},
            hovertemplate=f"{middle:+.3f} % ({low:+.3f} .. {high:+.3f})<br>{found.verdict}<extra>{name}</extra>",
        )
    made.update_xaxes(title=f"difference in {word}, %", zeroline=True, zerolinecolor=INK)
    made.update_yaxes(range=[len(shown) - 0.5, -0.5])
    return made


def pairs(rows: Sequence[Row], sums: Mapping[str, UnitSums | None], of: str = "") -> Figure:
    """Every row of a model beside every other: percent of perplexity, row less column; a dot without colour where not
    significant.

    ``of``: what they were judged on, for the title.
    """
    names = [label(row) for row in rows]
    values, seen = np.full((2, len(rows), len(rows)), np.nan)
    words = [["" for _ in rows] for _ in rows]
    for down, row in enumerate(rows):
        for across, other in enumerate(rows):
            found = None if down == across else paired(sums[other["id"]], sums[row["id"]])
            if found is not None:
                values[down, across] = 100 * (found.perplexity_ratio - 1)
                loud = found.verdict != "not significant"
                words[down][across] = f"{values[down, across]:+.1f}" if loud else "·"
                seen[down, across] = values[down, across] if loud else 0.0
    made = figure(
        f"{rows[0]['model']}{of}: row beside column, % of perplexity (· not significant)", 190 + 28 * len(rows)
    )
    bound = float(np.nanmax(np.abs(seen), initial=1e-9))
    made.add_heatmap(
        z=seen.tolist(),
        customdata=values.tolist(),
        x=names,
        y=names,
        text=words,
        texttemplate="%{text}",
        colorscale=[[0, COLOURS[0]], [0.5, "#ffffff"], [1, COLOURS[6]]],
        zmin=-min(bound, 10.0),
        zmax=min(bound, 10.0),
        xgap=1,
        ygap=1,
        colorbar={"title": "%", "thickness": 12},
        hovertemplate="%{y}<br>beside %{x}<br>%{customdata:+.3f} %<extra></extra>",
    )
    made.update_xaxes(showgrid=False)
    made.update_yaxes(autorange="reversed", showgrid=False)
    return made


def by_position(rows: Sequence[Row], place: int) -> Figure | None:
    """KL against the distance from a window's start, a line a row of one model, of evaluation ``place``; None where
    nothing was judged over two spans or more."""
    lines = {label(row): row["evaluations"][place].get("by_position") or [] for row in rows}
    lines = {name: spans for name, spans in lines.items() if len(spans) > 1 and (spans[0]["kl"] or 0) > SMALLEST_KL}
    if not lines:
        return None
    entry = rows[0]["evaluations"][place]
    title = f"{rows[0]['model']}, {entry['text']}, {entry['mode']}: KL by tokens since the window began"
    made = figure(title, height=380 + 18 * len(lines))
    heights = [span["kl"] for spans in lines.values() for span in spans]
    middles = [(span["start"] + span["stop"]) / 2 for spans in lines.values() for span in spans]
    for number, (name, spans) in enumerate(lines.items()):
        bounds = [span["kl_ci"] or (span["kl"], span["kl"]) for span in spans]
        made.add_scatter(
            x=[(span["start"] + span["stop"]) / 2 for span in spans],
            y=[span["kl"] for span in spans],
            mode="lines+markers",
            name=name,
            line={"dash": DASHES[number // len(COLOURS) % len(DASHES)]},
            error_y={
                "type": "data",
                "array": [high - span["kl"] for (_, high), span in zip(bounds, spans, strict=True)],
                "arrayminus": [span["kl"] - low for (low, _), span in zip(bounds, spans, strict=True)],
                "thickness": 1,
                "width": 3,
            },
            customdata=[[span["start"], span["stop"] - 1, span["nats_per_token"]] for span in spans],
            hovertemplate="%{customdata[0]} to %{customdata[1]}: %{y:.5g}<br>%{customdata[2]:.4f} nats lost<extra>"
            + name
            + "</extra>",
        )
    made.update_xaxes(title="tokens since the window began (middle of the stretch)", **logarithmic(middles))
    made.update_yaxes(title="KL to the float model, nats a token", **logarithmic(heights))
    return made


def seed_spread(rows: Sequence[Row], place: int = 0, name: str = "perplexity") -> dict[tuple[str, str], list[float]]:
    """Model, and recipe with override -> a figure of evaluation ``place`` for every seed: of those with several."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row["evaluations"][place].get(name)
        if value is not None:
            groups.setdefault((row["model"], label({**row, "seed": 0})), []).append(value)
    return {group: values for group, values in groups.items() if len(values) > 1}


def steps(levels: np.ndarray) -> tuple[float, float]:
    """Smallest and largest distance between neighbouring levels."""
    gaps = [second - first for first, second in pairwise(levels.tolist())]
    return min(gaps), max(gaps)
