"""One HTML page of a study that needs nothing else: styles, plotly and data are in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from squamata import __version__
from squamata.errors import SquamataError
from squamata.evaluate.uncertainty import FEWEST_UNITS
from squamata.report import figures, site_figures
from squamata.report.accuracy import tasks_of
from squamata.report.compare import Comparison, Measure, Row, sums_of, task_verdicts, verdicts
from squamata.report.distributions import unpack_distributions
from squamata.report.page_style import END, STYLE, WATCH
from squamata.report.rows import STUDY, read_details, read_plan
from squamata.text import check_writable, write_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MEASURES: tuple[Measure, ...] = ("nats", "kl")
KINDS = ("sensitivity", "outliers")
LARGEST_PAIRS = 24  # rows of a table of all pairs
DISTRIBUTION_ROWS, DISTRIBUTIONS = 6, 24  # rows whose distributions are drawn, and figures of each


def check_out(out: Path | None) -> None:
    """Refuse, before any work is done, a page that could not be written after it, or has no plotly."""
    if out is not None:
        figures.require_plotly()
        check_writable(out, "--out")


def read_others(folder: Path) -> list[dict[str, Any]]:
    """JSON files of sensitivity and outliers in a folder, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name == STUDY:
            continue
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError):
            raise SquamataError(f"{path}: not a readable JSON file; take it out of the folder") from None
        if isinstance(content, dict) and content.get("kind") in KINDS:
            found.append(content)
    return found


def write_page(
    out: Path,
    title: str,
    study: Mapping[str, Any],
    rows: Sequence[Row],
    others: Sequence[Mapping[str, Any]],
    folder: Path | None = None,
) -> None:
    """Write the page: the study's rows (details in ``folder``) and what sensitivity and outliers found."""
    from plotly.offline import get_plotlyjs

    body = "".join(_sections(study, rows, others, folder or Path()))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style><script>{WATCH}</script>"
        f"<script>{get_plotlyjs()}</script></head><body><main><h1>{escape(title)}</h1>"
        f"<p class='lead'>{escape(study.get('description', ''))}</p>{body}"
        f"<footer>squamata {__version__}</footer></main><script>{END}</script></body></html>\n"
    )
    write_whole(out, page)


class _Drawing:
    """Figures to HTML, numbered, so that the same data give the same page."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.number = prefix, 0

    def __call__(self, made: Figure) -> str:
        self.number += 1
        return (
            "<div class='card'>"
            + made.to_html(
                full_html=False,
                include_plotlyjs=False,
                div_id=f"{self.prefix}-{self.number}",
                config={"displaylogo": False, "responsive": True, "displayModeBar": "hover"},
            )
            + "</div>"
        )


def _sections(
    study: Mapping[str, Any], rows: Sequence[Row], others: Sequence[Mapping[str, Any]], folder: Path
) -> Iterator[str]:
    if rows:
        judged = _judged(study, rows, folder)
        yield "<h2>Rows</h2>" + _conditions(rows) + _missing(rows, folder) + _table(rows, judged) + _seeds(rows, judged)
        yield _tasks(study, rows, folder)
        yield from _fronts(rows)
        yield from _differences(rows, judged, folder)
        yield from _positions(rows)
        yield from _distributions(rows, folder)
    yield from _sensitivities([found for found in others if found["kind"] == "sensitivity"])
    yield from _outliers([found for found in others if found["kind"] == "outliers"])
    if rows:
        yield _provenance(rows)


@dataclass(frozen=True)
class Judged:
    """One evaluation of all rows: the text and mode ``of`` which it is, where there are several, and the rows beside
    their baselines."""

    of: str
    nats: Mapping[str, Comparison]
    kl: Mapping[str, Comparison]


def _judged(study: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Judged]:
    entries = rows[0]["evaluations"]
    names = [f", {entry['text']}, {entry['mode']}" if len(entries) > 1 else "" for entry in entries]
    return [
        Judged(name, *(verdicts(folder, study, rows, place, measure) for measure in MEASURES))
        for place, name in enumerate(names)
    ]


def _conditions(rows: Sequence[Row]) -> str:
    judged = {row["model"]: row["evaluations"][0] for row in rows}
    first = rows[0]["evaluations"][0]
    amounts = {model: _amount(entry) for model, entry in judged.items()}
    same = len(set(amounts.values())) == 1
    told = [f"{_amount(first) if same else ', '.join(map(': '.join, amounts.items()))} of {first['text']}"]
    told += [f"windows of {first['window']}", f"{first['mode']} unless said otherwise"]
    versions = sorted({row["provenance"]["squamata_version"] for row in rows})
    told.append(f"measured by squamata {', '.join(versions)}")
    if len(versions) > 1:
        told.append("rows of different versions: compare with care")
    told += sorted({_made_on(row) for row in rows if "measured_on" in row})
    drawn = sorted({row["provenance"].get("calibration_sha256") or "" for row in rows} - {""})
    if drawn:
        told.append(f"calibration text{'s' if len(drawn) > 1 else ''} sha256 {', '.join(each[:12] for each in drawn)}")
    enough = {entry["documents"] >= FEWEST_UNITS for entry in judged.values()}
    units = " or ".join(word for word, meant in (("documents", True), ("windows", False)) if meant in enough)
    said = f"Intervals are 95 % bootstrap intervals over {units}; under them the difference from the baseline, paired."
    return f"<p>{escape('; '.join(told))}. {said}</p>"


def _amount(entry: Mapping[str, Any]) -> str:
    count = entry["documents"]
    return f"{entry['tokens']} tokens of {count} document{'s' if count > 1 else ''}"


def _missing(rows: Sequence[Row], folder: Path) -> str:
    """What the study asks for and has no row of, with the reason if a run gave one."""
    written, planned = {row["id"] for row in rows}, read_plan(folder)[1]
    left = [row for row in planned if row.id not in written]
    if not left:
        return ""
    told = "".join(f"<li>{escape(row.error or f'{row.name}: not measured yet')}</li>" for row in left[:LARGEST_PAIRS])
    more = f"<li>and {len(left) - LARGEST_PAIRS} more</li>" if len(left) > LARGEST_PAIRS else ""
    return f"<p class='worse'>{len(left)} of {len(planned)} rows are missing:</p><ul class='worse'>{told}{more}</ul>"


def _made_on(row: Row) -> str:
    made = row["measured_on"]
    kernels = "integer kernels" if made["arithmetic"] == "integer" else "simulated"
    return f"{made['device']}: {kernels}"


def _table(rows: Sequence[Row], judged: Sequence[Judged]) -> str:
    chip = {name: cost for name, cost in figures.CHIP.items() if any(name in row.get("hardware", {}) for row in rows)}
    heads = ["model", "recipe", "variation", "seed", "MB", "bits a parameter"]
    heads += [f"{word}{each.of}" for each in judged for word in ("perplexity", "KL, nats a token")]
    heads += ["same top token, %", "bits a byte", *(cost.words for cost in chip.values())]
    lines = []
    for row in rows:
        first = row["evaluations"][0]
        cells = [escape(str(row[name])) for name in ("model", "recipe", "override", "seed")]
        cells += [f"{row['bytes']['total'] / 1e6:.2f}", f"{8 * row['bytes']['total'] / row['parameters']:.2f}"]
        for place, each in enumerate(judged):
            entry = row["evaluations"][place]
            cells += [_with_interval(entry, "perplexity", 3) + _verdict(each.nats[row["id"]])]
            cells += [_with_interval(entry, "kl", 5) + _verdict(each.kl[row["id"]])]
        cells += [_with_interval(first, "top1_agreement", 2, 100), f"{row['bits_per_byte']:.4f}"]
        cells += [_number(row.get("hardware", {}).get(name), cost.unit) for name, cost in chip.items()]
        lines.append(_line(cells, "td"))
    return f"<div class='card wide'><table>{_line(map(escape, heads), 'th')}{''.join(lines)}</table></div>"


def _line(cells: Any, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _number(value: Any, unit: float) -> str:
    return f"{value / unit:.4g}" if isinstance(value, int | float) else ""


def _with_interval(entry: Mapping[str, Any], name: str, digits: int, times: float = 1.0) -> str:
    if entry.get(name) is None:
        return ""
    bounds = entry.get(f"{name}_ci")
    around = (
        "" if bounds is None else f"<small>{times * bounds[0]:.{digits}f} .. {times * bounds[1]:.{digits}f}</small>"
    )
    return f"{times * entry[name]:.{digits}f}{around}"


def _verdict(found: Comparison) -> str:
    kind = found.verdict.replace(" ", "-") or "none"
    return f"<small class='{kind}'>{escape(found.words)}</small>" if found.words else ""


def _seeds(rows: Sequence[Row], judged: Sequence[Judged]) -> str:
    measured = [
        (place, name, digits) for place in range(len(judged)) for name, digits in (("perplexity", 4), ("kl", 6))
    ]
    spread = [figures.seed_spread(rows, place, name) for place, name, _ in measured]
    if not spread[0]:
        return ""
    heads = ["model", "recipe", "seeds"]
    heads += [f"{word}{each.of}" for each in judged for word in ("perplexity", "KL, nats a token")]
    lines = []
    for group, seeds in spread[0].items():
        cells = [*map(escape, group), str(len(seeds))]
        cells += [_mean(some.get(group, ()), digits) for some, (_, _, digits) in zip(spread, measured, strict=True)]
        lines.append(_line(cells, "td"))
    told = "<h3>Over calibration seeds: mean ± standard deviation</h3>"
    return f"{told}<div class='card wide'><table>{_line(map(escape, heads), 'th')}{''.join(lines)}</table></div>"


def _tasks(study: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> str:
    names = tasks_of(rows)
    if not names:
        return ""
    beside = {name: task_verdicts(folder, study, rows, name) for name in names}
    counts = {name: some["examples"] for row in rows for name, some in row.get("tasks", {}).items()}
    lines = []
    for row in rows:
        cells = [escape(str(row[name])) for name in ("model", "recipe", "override", "seed")]
        cells += [_accuracy(row.get("tasks", {}).get(name)) + _verdict(beside[name][row["id"]]) for name in names]
        lines.append(_line(cells, "td"))
    heads = ["model", "recipe", "variation", "seed"]
    heads += [f"{name}, % of {counts[name]}" for name in names]
    told = "<h3>Tasks: accuracy ± standard error, and the paired difference from the baseline</h3>"
    return f"{told}<div class='card wide'><table>{_line(map(escape, heads), 'th')}{''.join(lines)}</table></div>"


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    error = found["accuracy_stderr"]
    return f"{100 * found['accuracy']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else ""


def _fronts(rows: Sequence[Row]) -> Iterator[str]:
    draw = _Drawing("front")
    yield "<h2>What it costs</h2>"
    for cost, quality in (("bytes", "kl"), ("bytes", "perplexity"), *((name, "kl") for name in figures.CHIP)):
        costs = {row.get("hardware", {}).get(cost) for row in rows}
        if cost in figures.CHIP and len(rows) > 1 and len(costs) == 1:
            continue  # one and the same for all: nothing to choose
        made = figures.pareto(rows, cost, quality)
        if made.data:
            yield draw(made)


def _differences(rows: Sequence[Row], judged: Sequence[Judged], folder: Path) -> Iterator[str]:
    if len(rows) < 2:
        return
    draw = _Drawing("difference")
    yield "<h2>Which differences are real</h2>"
    for each in judged:
        of = each.of.removeprefix(", ")
        made = figures.differences(rows, each.nats, "nats", of), figures.differences(rows, each.kl, "kl", of)
        yield from (draw(one) for one in made if one.data)
    sums = sums_of(folder, rows)
    for model in figures.models_of(rows):
        same = [row for row in rows if row["model"] == model]
        if 1 < len(same) <= LARGEST_PAIRS:
            yield draw(figures.pairs(same, sums, judged[0].of))


def _positions(rows: Sequence[Row]) -> Iterator[str]:
    """What stepping token by token shows, one figure a model and text."""
    draw = _Drawing("position")
    drawn = []
    for model in figures.models_of(rows):
        same = [row for row in rows if row["model"] == model]
        stepped = [place for place, entry in enumerate(same[0]["evaluations"]) if entry["mode"] == "recurrent"]
        made = [figures.by_position(same, place) for place in stepped]
        drawn += [draw(each) for each in made if each is not None]
    if drawn:
        yield "<h2>How the error grows with the distance</h2>" + "".join(drawn)


def _distributions(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    draw = _Drawing("distribution")
    drawn: list[str] = []
    left = 0
    for row in rows:
        found = unpack_distributions(read_details(folder, row["id"]))
        if not any(entry.levels.size for entry in found):
            continue
        if len(drawn) == DISTRIBUTION_ROWS:
            left += 1
            continue
        name = f"{row['model']}, {figures.label(row)}"
        shown = found[:DISTRIBUTIONS]
        pictures = "".join(draw(site_figures.distribution(entry, f"{name}: {entry.site}")) for entry in shown)
        drawn.append(f"<details{'' if drawn else ' open'}><summary>{escape(name)}</summary>{pictures}</details>")
    if drawn:
        yield "<h2>What lands on the sites</h2><p>Red ticks: every level that the number format has; red shade: beyond "
        yield "them. Observed in float, on the beginning of the first text.</p>" + "".join(drawn)
        yield f"<p>{left} more rows have such pictures; make a study of fewer to see them.</p>" if left else ""


def _sensitivities(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    draw = _Drawing("sensitivity")
    if found:
        yield "<h2>Which sites and layers are sensitive</h2>"
    for entry in found:
        yield draw(site_figures.sensitivity(entry))
        if "search" in entry:
            yield draw(site_figures.search(entry))


def _outliers(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    draw = _Drawing("outliers")
    if found:
        yield "<h2>Outlier channels</h2>"
    for entry in found:
        yield draw(site_figures.outlier_peaks(entry))
        if entry["zeroed"]:
            yield draw(site_figures.outlier_channels(entry)) + draw(site_figures.zeroed(entry))


def _provenance(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        told = {"seconds": [row["quantize_seconds"], row["evaluate_seconds"]], "peak_rss_bytes": row["peak_rss_bytes"]}
        told |= {"id": row["id"], "provenance": row["provenance"], "recipe": row["resolved_recipe"]}
        text = escape(json.dumps(told, indent=1))
        name = escape(f"{row['model']}, {figures.label(row)}")
        parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "<h2>How to repeat it</h2>" + "".join(parts)
