"""Pictures of sites: sensitivity, distributions with the grid over them, outlier channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from squamata.report.distributions import Distribution
from squamata.report.figures import COLOURS, FAINT, INK, SCALE, VERDICTS, figure, steps, upright
from squamata.report.labels import logarithmic

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHOWN = 40  # bars of a ranking
FAINTEST = 1e-7  # a KL that is drawn as nothing
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "hexagon")
RUG = 1024  # levels that are drawn one by one


def split_cell(unit: str) -> tuple[int | None, str]:
    """``layers.3.mixer.u`` -> 3 and ``mixer.u``; what is in no layer -> None and itself."""
    parts = unit.split(".", 2)
    return (int(parts[1]), parts[2]) if len(parts) == 3 and parts[0] == "layers" else (None, unit)


def sensitivity(found: Mapping[str, Any]) -> Figure:
    """A heat map of layers x sites if single cells were toggled, else a ranking."""
    return _heat(found) if found["per"] == "cell" else _ranking(found)


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['model']} by {found['recipe']}: KL of one {found['per']} quantized alone ({found['mode']})"


def _heat(found: Mapping[str, Any]) -> Figure:
    cells = {split_cell(row["unit"]): row for row in found["rows"]}
    parts = list(dict.fromkeys(part for layer, part in sorted(cells, key=_place(found)) if layer is not None))
    layers = sorted({layer for layer, _ in cells if layer is not None})
    floor = max(found["floor_kl"], FAINTEST)
    kl = [[_kl(cells.get((layer, part))) for layer in layers] for part in parts]
    logs = [[None if value is None else float(np.log10(max(value, floor))) for value in line] for line in kl]
    words = "KL %{customdata:.3g}"
    outside = [f"{part} {row['kl']:.2g}" for (layer, part), row in cells.items() if layer is None]
    told = f"<br><sub>outside the layers: KL of {', '.join(outside)}</sub>" if outside else ""
    return _layers_by_sites(_title(found) + told, (parts, layers), logs, "log10 KL", words, customdata=kl)


def _layers_by_sites(
    title: str,
    axes: tuple[Sequence[str], Sequence[int]],
    values: Sequence[Sequence[float | None]],
    unit: str,
    words: str,
    **options: Any,
) -> Figure:
    """A heat map: a line a site (``axes[0]``), a column a layer; ``words``: what is said of a cell under the mouse."""
    parts, layers = axes
    made = figure(title, 150 + 25 * len(parts))
    made.add_heatmap(
        z=values,
        x=[str(layer) for layer in layers],
        y=[part.removeprefix("mixer.") for part in parts],
        colorscale=SCALE,
        xgap=2,
        ygap=2,
        colorbar={"title": unit, "thickness": 12},
        hovertemplate=f"layer %{{x}}, %{{y}}<br>{words}<extra></extra>",
        **options,
    )
    made.update_xaxes(title="layer", type="category", showgrid=False)
    made.update_yaxes(autorange="reversed", showgrid=False)
    return made


def _place(found: Mapping[str, Any]) -> Any:
    """Sort key: the site with the largest mean KL comes first."""
    totals: dict[str, list[float]] = {}
    for row in found["rows"]:
        totals.setdefault(split_cell(row["unit"])[1], []).append(row["kl"])
    return lambda cell: (-float(np.mean(totals[cell[1]])), cell[1], cell[0] or 0)


def _kl(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else float(row["kl"])


def _ranking(found: Mapping[str, Any]) -> Figure:
    rows = list(found["rows"][:SHOWN])
    values = [row["kl"] for row in rows]
    bounds = [row["kl_ci"] or (row["kl"], row["kl"]) for row in rows]
    made = figure(_title(found), 150 + 22 * len(rows), showlegend=False)
    made.add_scatter(
        x=values,
        y=[row["unit"] for row in rows],
        mode="markers",
        marker={"size": 9, "color": [VERDICTS[row["verdict"]] for row in rows]},
        error_x={
            "type": "data",
            "array": [high - value for (_, high), value in zip(bounds, values, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(bounds, values, strict=True)],
            "color": FAINT,
        },
        customdata=[[row["perplexity"], row["verdict"]] for row in rows],
        hovertemplate="<b>%{y}</b><br>KL %{x:.3g}<br>perplexity %{customdata[0]:.4f}, %{customdata[1]}<extra></extra>",
    )
    upright(made, found["together_kl"], "all together", INK, logarithmic=True)
    title = "KL to float, nats a token (red: perplexity worse, green: better, grey: not significantly changed)"
    made.update_xaxes(title=title, **logarithmic([*values, found["together_kl"]]))
    made.update_yaxes(autorange="reversed")
    return made


def search(found: Mapping[str, Any]) -> Figure:
    """Mixtures of two recipes: KL against size or what else the budget is of, with intervals, and the budget."""
    made = figure(f"{found['model']}: mixed precision under a budget")
    mixtures, stored = found["search"]["mixtures"], "budget_bytes" in found["search"]
    for number, mixture in enumerate(mixtures):
        low, high = mixture["kl_ci"] or (mixture["kl"], mixture["kl"])
        colour = COLOURS[number % len(COLOURS)]
        made.add_scatter(
            x=[mixture["bytes"] / 1e6 if stored else mixture["price"]],
            y=[mixture["kl"]],
            name=mixture["name"],
            mode="markers",
            marker={  # two searches may find the same
                "size": 9 + 4 * number,
                "color": colour,
                "symbol": f"{SYMBOLS[number % len(SYMBOLS)]}-open",
                "line": {"width": 2},
            },
            error_y={"type": "data", "array": [high - mixture["kl"]], "arrayminus": [mixture["kl"] - low]},
            hovertext="<br>".join(mixture["upgraded"][:20]) or "nothing upgraded",
        )
    budget = found["search"]["budget_bytes"] / 1e6 if stored else found["search"]["budget"]
    upright(made, budget, "budget", FAINT)
    made.update_xaxes(title="stored size, MB" if stored else found["search"]["unit"])
    made.update_yaxes(title="KL to float, nats a token")
    return made


def distribution(found: Distribution, title: str) -> Figure:
    """A histogram on a logarithmic axis, the format's levels as a rug below it, what is clipped shaded."""
    edges = np.linspace(found.low, found.high, len(found.counts) + 1)
    share = found.counts / max(1.0, found.counts.sum())
    made = figure(f"{title}<br><sub>{_grid_words(found)}</sub>", 340, showlegend=False, bargap=0)
    made.add_bar(
        x=((edges[1:] + edges[:-1]) / 2).tolist(),
        y=[value if value > 0 else None for value in share.tolist()],
        marker={"color": COLOURS[2], "line": {"width": 0}},
        hovertemplate="%{x:.4g}: %{y:.2e} of the values<extra></extra>",
    )
    made.update_yaxes(type="log", title="share of values", exponentformat="power")
    made.update_xaxes(title="value")
    if found.levels.size:
        _draw_grid(made, found, float(share[share > 0].min()))
    return made


def _draw_grid(made: Figure, found: Distribution, smallest: float) -> None:
    low, high = float(found.levels[0]), float(found.levels[-1])
    rug = found.levels[:: max(1, len(found.levels) // RUG)]
    made.add_scatter(
        x=rug.tolist(),
        y=[smallest / 2] * len(rug),
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 9, "color": COLOURS[6], "line": {"width": 1}},
        hovertemplate="level %{x:.5g}<extra></extra>",
    )
    for edge, beyond in ((low, found.low), (high, found.high)):
        made.add_vline(edge, line={"color": COLOURS[6], "width": 1.5})
        if abs(beyond) > abs(edge):
            made.add_vrect(min(edge, beyond), max(edge, beyond), fillcolor=COLOURS[6], opacity=0.12, line_width=0)


def _grid_words(found: Distribution) -> str:
    if not found.levels.size:
        return "float, or a scale taken at run time"
    smallest, largest = steps(found.levels)
    step = f"step {smallest:.3g}" if largest < 1.001 * smallest else f"steps {smallest:.3g} to {largest:.3g}"
    of = "" if found.scales <= 1 else f", drawn for the median of {found.scales} scales"
    clipped = "" if found.clipped is None else f"; clipped: {found.clipped:.1e} of the values"
    return f"{len(found.levels)} levels, {step}{of}{clipped}"


def outlier_channels(found: Mapping[str, Any]) -> Figure:
    """Which channels of which layer: a column of marks is a channel that persists over the layers."""
    made = figure(f"{found['model']}: channels beyond {found['sigmas']:g} sigma", 460)
    parts = list(dict.fromkeys(row["part"] for row in found["rows"] if row["outliers"]))
    for number, part in enumerate(parts):
        marks = [(channel, row["layer"]) for row in found["rows"] if row["part"] == part for channel in row["outliers"]]
        made.add_scatter(
            x=[channel for channel, _ in marks],
            y=[layer for _, layer in marks],
            mode="markers",
            name=part.removeprefix("mixer."),
            marker={  # the same channel may stick out at several sites: a mark leaves those below it visible
                "size": 7 + 2 * number,
                "symbol": f"{SYMBOLS[number % len(SYMBOLS)]}-open",
                "color": COLOURS[number % len(COLOURS)],
                "line": {"width": 2},
            },
            hovertemplate=f"{part}<br>channel %{{x}}, layer %{{y}}<extra></extra>",
        )
    made.update_xaxes(title="channel")
    made.update_yaxes(title="layer", dtick=1)
    return made


def outlier_peaks(found: Mapping[str, Any]) -> Figure:
    """Layers x sites: the largest magnitude over the mean of the channels' largest."""
    cells = {(row["layer"], row["part"]): row for row in found["rows"] if row["layer"] >= 0}
    parts = list(dict.fromkeys(part for _, part in cells))
    layers = sorted({layer for layer, _ in cells})
    values = [[_largest(cells.get((layer, part))) for layer in layers] for part in parts]
    counts = [[_count(cells.get((layer, part))) for layer in layers] for part in parts]
    title = f"{found['model']}: largest channel over the mean (numbers: channels beyond {found['sigmas']:g} sigma)"
    words = "%{z:.3g} times the mean"
    return _layers_by_sites(title, (parts, layers), values, "times", words, text=counts, texttemplate="%{text}")


def _largest(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else float(row["largest"])


def _count(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or not row["outliers"] else str(len(row["outliers"]))


def zeroed(found: Mapping[str, Any]) -> Figure:
    """KL after zeroing outlier channels, beside as many channels drawn at random."""
    rows: Sequence[Mapping[str, Any]] = found["zeroed"]
    names = [f"{row['part'].removeprefix('mixer.')} ({row['channels']})" for row in rows]
    made = figure(f"{found['model']}: channels set to zero, KL to the model as it is", 380)
    bounds = [row.get("kl_ci") or (row["kl"], row["kl"]) for row in rows]
    made.add_scatter(
        x=names,
        y=[row["kl"] for row in rows],
        name="outlier channels",
        mode="markers",
        marker={"size": 11, "color": COLOURS[6]},
        error_y={
            "type": "data",
            "array": [high - row["kl"] for (_, high), row in zip(bounds, rows, strict=True)],
            "arrayminus": [row["kl"] - low for (low, _), row in zip(bounds, rows, strict=True)],
        },
    )
    marker = {"size": 11, "color": FAINT, "symbol": "diamond"}
    made.add_scatter(
        x=names, y=[row["random_kl"] for row in rows], name="as many at random", mode="markers", marker=marker
    )
    made.update_xaxes(title="site (channels zeroed in all layers)", color=INK, type="category")
    heights = [row[name] for row in rows for name in ("kl", "random_kl")]
    made.update_yaxes(title="KL, nats a token", **logarithmic(heights))
    return made
