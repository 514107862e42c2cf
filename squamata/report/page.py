"""One HTML page of a study that needs nothing else: styles, plotly and data are in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squamata import __version__
from squamata.errors import SquamataError
from squamata.evaluate.uncertainty import FEWEST_UNITS
from squamata.report import figures, site_figures
from squamata.report.compare import Comparison, Row, sums_of, verdicts
from squamata.report.distributions import unpack_distributions
from squamata.report.page_style import END, STYLE, WATCH
from squamata.report.rows import STUDY, read_details, read_plan
from squamata.text import check_writable, write_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

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
        compared = verdicts(folder, study, rows)
        yield "<h2>Rows</h2>" + _conditions(rows) + _missing(rows, folder) + _table(rows, compared) + _seeds(rows)
        yield from _fronts(rows)
        yield from _differences(rows, compared, folder)
        yield from _positions(rows)
        yield from _distributions(rows, folder)
    yield from _sensitivities([found for found in others if found["kind"] == "sensitivity"])
    yield from _outliers([found for found in others if found["kind"] == "outliers"])
    if rows:
        yield _provenance(rows)


def _conditions(rows: Sequence[Row]) -> str:
    first, source = rows[0]["evaluations"][0], rows[0]["provenance"]
    count = first["documents"]
    told = [f"{first['tokens']} tokens of {count} document{'s' if count > 1 else ''} of {first['text']}"]
    told += [f"windows of {first['window']}", f"{first['mode']} unless a column says otherwise"]
    versions = sorted({row["provenance"]["squamata_version"] for row in rows})
    told.append(f"measured by squamata {', '.join(versions)}")
    if len(versions) > 1:
        told.append("rows of different versions: compare with care")
    told += sorted({_made_on(row) for row in rows if "measured_on" in row})
    if source.get("calibration_sha256"):
        told.append(f"calibration text sha256 {source['calibration_sha256'][:12]}")
    units = "documents" if count >= FEWEST_UNITS else "windows"
    return f"<p>{escape('; '.join(told))}. Intervals are 95 % bootstrap intervals over {units}.</p>"


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


def _table(rows: Sequence[Row], compared: Mapping[str, Comparison]) -> str:
    further = [(entry["text"], entry["mode"]) for entry in rows[0]["evaluations"][1:]]
    chip = {name: words for name, words in figures.CHIP.items() if any(name in row.get("hardware", {}) for row in rows)}
    heads = ["model", "recipe", "variation", "seed", "MB", "bits a parameter", "perplexity", "beside the baseline"]
    heads += ["KL, nats a token", "same top token, %", "bits a byte"]
    heads += [f"perplexity, {text}, {mode}" for text, mode in further] + list(chip.values())
    lines = []
    for row in rows:
        first = row["evaluations"][0]
        cells = [escape(str(row[name])) for name in ("model", "recipe", "override", "seed")]
        cells += [f"{row['bytes']['total'] / 1e6:.2f}", f"{8 * row['bytes']['total'] / row['parameters']:.2f}"]
        cells += [_with_interval(first, "perplexity", 3), _verdict(compared[row["id"]])]
        cells += [_with_interval(first, "kl", 5), _with_interval(first, "top1_agreement", 2, 100)]
        cells += [f"{row['bits_per_byte']:.4f}"]
        cells += [_with_interval(entry, "perplexity", 3) for entry in row["evaluations"][1:]]
        cells += [_number(row.get("hardware", {}).get(name)) for name in chip]
        lines.append(_line(cells, "td"))
    return f"<div class='card wide'><table>{_line(map(escape, heads), 'th')}{''.join(lines)}</table></div>"


def _line(cells: Any, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _with_interval(entry: Mapping[str, Any], name: str, digits: int, times: float = 1.0) -> str:
    if entry.get(name) is None:
        return ""
    bounds = entry.get(f"{name}_ci")
    around = (
        "" if bounds is None else f"<small>{times * bounds[0]:.{digits}f} .. {times * bounds[1]:.{digits}f}</small>"
    )
    return f"{times * entry[name]:.{digits}f}{around}"


def _verdict(found: Comparison) -> str:
    kind = found.difference.verdict.replace(" ", "-") if found.difference else "none"
    return f"<span class='{kind}'>{escape(found.words)}</span>"


def _seeds(rows: Sequence[Row]) -> str:
    spread = figures.seed_spread(rows)
    if not spread:
        return ""
    lines = [
        _line([escape(model), escape(name), f"{mean:.4f}", f"{deviation:.4f}", count], "td")
        for model, name, mean, deviation, count in spread
    ]
    heads = _line(["model", "recipe", "mean perplexity", "standard deviation over seeds", "seeds"], "th")
    return f"<h3>Over calibration seeds</h3><div class='card wide'><table>{heads}{''.join(lines)}</table></div>"


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


def _differences(rows: Sequence[Row], compared: Mapping[str, Comparison], folder: Path) -> Iterator[str]:
    if len(rows) < 2:
        return
    draw = _Drawing("difference")
    beside = figures.differences(rows, compared)
    yield "<h2>Which differences are real</h2>" + (draw(beside) if beside.data else "")
    sums = sums_of(folder, rows)
    for model in figures.models_of(rows):
        same = [row for row in rows if row["model"] == model]
        if 1 < len(same) <= LARGEST_PAIRS:
            yield draw(figures.pairs(same, sums))


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
    for row in rows:
        found = unpack_distributions(read_details(folder, row["id"]))
        if found and any(entry.levels.size for entry in found):
            name = f"{row['model']}, {figures.label(row)}"
            shown = found[:DISTRIBUTIONS]
            pictures = "".join(draw(site_figures.distribution(entry, f"{name}: {entry.site}")) for entry in shown)
            drawn.append(f"<details{'' if drawn else ' open'}><summary>{escape(name)}</summary>{pictures}</details>")
    if drawn:
        yield "<h2>What lands on the sites</h2><p>Red ticks: every level that the number format has; red shade: "
        yield "clipped.</p>" + "".join(drawn[:DISTRIBUTION_ROWS])


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
