"""The page: figures say what the rows say, and a browser draws all of it without a network."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import UnitSums
from squamata.report import site_figures
from squamata.report.compare import baseline_of, sums_of, verdicts
from squamata.report.figures import by_position, differences, pairs, pareto_front, seed_spread
from squamata.report.labels import PLACES, box_of, logarithmic, pixels, place_names
from squamata.report.page import check_out, read_others, write_page
from squamata.report.rows import Planned, append_row, locked, pack_sums, read_study, write_plan

pytest.importorskip("plotly", reason="the library 'plotly' is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome here to draw the page")
DOCUMENTS = 40


def row_of(recipe: str, shift: float, **fields: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A made-up row: ``shift`` nats a token more than the float row, give or take."""
    draw = np.random.default_rng(len(recipe))
    tokens = np.random.default_rng(0).integers(50, 100, DOCUMENTS).astype(float)
    base = tokens * np.random.default_rng(1).uniform(2, 4, DOCUMENTS)
    nats = base + tokens * (shift + (0.01 * draw.standard_normal(DOCUMENTS) if shift else 0.0))
    perplexity = float(np.exp(nats.sum() / tokens.sum()))
    first = {"text": "some <text>", "mode": "parallel", "perplexity": perplexity, "kl": abs(shift), "window": 64}
    first |= {"perplexity_ci": [perplexity - 1, perplexity + 1], "kl_ci": [0.9 * abs(shift), 1.1 * abs(shift)]}
    first |= {"top1_agreement": 0.97, "top1_agreement_ci": [0.96, 0.98], "bits_per_byte": 1.2}
    first |= {"tokens": int(tokens.sum()), "documents": DOCUMENTS}
    spans = [{"start": at, "stop": 2 * at or 128, "nats_per_token": 3.0, "nats_ci": None} for at in (0, 128, 256)]
    spans = [
        span | {"kl": abs(shift) * (n + 1), "kl_ci": (None, [shift, 4 * shift])[n > 0]} for n, span in enumerate(spans)
    ]
    stepped = first | {"mode": "recurrent", "by_position": spans}
    row = {"id": f"{recipe}{shift}", "model": "m</script><1>", "recipe": recipe, "override": "as it is", "seed": 0}
    row |= {name: first[name] for name in ("perplexity", "kl", "top1_agreement", "bits_per_byte")}
    row |= {"bytes": {"total": 1_000_000 * len(recipe)}, "parameters": 1_000_000, "evaluations": [first, stepped]}
    row |= {"provenance": {"squamata_version": "0.1.0"}, "resolved_recipe": {"name": recipe}, "peak_rss_bytes": 5}
    return row | {"quantize_seconds": 1.0, "evaluate_seconds": 2.0} | fields, pack_sums(
        0, UnitSums("documents", tokens, nats)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of four rows with everything that a page can show."""
    out = tmp_path / "study"
    with locked(out):
        made = [
            row_of("float", 0.0, hardware={"sram_mm2": 4.0}),
            row_of("w8a8", 0.001, hardware={"sram_mm2": 2.0}),
            row_of("w4a8-bad", 0.05, hardware={"sram_mm2": 1.0}),
            row_of("w4a8-bad", 0.06, seed=1),
        ]
        for row, details in made:
            levels = np.arange(-7, 8) / 4
            details |= {
                "distribution.layers.0.mixer.u.counts": np.arange(241.0),
                "distribution.layers.0.mixer.u.range": np.array([-2.0, 3.0]),
                "distribution.layers.0.mixer.u.levels": levels if row["recipe"] != "float" else np.zeros(0),
                "distribution.layers.0.mixer.u.scales": np.array(1),
            }
            append_row(out, row, details)
        asked = [Planned.of(row) for row, _ in made]
        write_plan(out, {"name": "made up", "description": "a <b>test</b>"}, asked)
    (out / "cells.json").write_text(json.dumps(sensitivity("cell")))
    (out / "layers.json").write_text(json.dumps(sensitivity("layer")))
    (out / "outliers.json").write_text(json.dumps(OUTLIERS))
    (out / "numbers.json").write_text('{"kind": "something else"}')
    return out


def sensitivity(per: str) -> dict[str, Any]:
    units = ["layers.0", "layers.1"] if per == "layer" else [f"layers.{n}.mixer.{s}" for n in (0, 1) for s in "ux"]
    rows = [
        {"unit": unit, "kl": 0.01 / (place + 1), "kl_ci": [0.001, 0.02], "perplexity": 9.0, "verdict": "worse"}
        for place, unit in enumerate(units)
    ]
    mixtures = [
        {"name": name, "bytes": 5e6, "kl": 0.1, "kl_ci": [0.09, 0.12], "upgraded": ["layers.0"]}
        for name in ("greedy", "evolution")
    ]
    found = {"kind": "sensitivity", "model": "m", "recipe": "r", "per": per, "mode": "parallel", "rows": rows}
    return found | {"floor_kl": 1e-9, "together_kl": 0.03, "search": {"budget_bytes": 6e6, "mixtures": mixtures}}


OUTLIERS: dict[str, Any] = {
    "kind": "outliers",
    "model": "m",
    "sigmas": 6.0,
    "rows": [{"layer": n, "part": "mixer.x", "outliers": [3] if n else [], "largest": 4.0} for n in (0, 1)],
    "zeroed": [{"part": "mixer.x", "channels": 1, "kl": 0.2, "random_kl": 0.01}],
}


def page_of(folder: Path, out: Path) -> str:
    study, rows = read_study(folder)
    write_page(out, study["name"], study, rows, read_others(folder), folder)
    return out.read_text()


def outside_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_verdicts_say_what_is_significant(folder: Path) -> None:
    study, rows = read_study(folder)
    found = verdicts(folder, study, rows)
    words = [found[row["id"]].words for row in rows]
    assert words[0] == "baseline" and words[1].endswith("not significant") and words[2].endswith(", worse")
    assert words[2][:4] in ("+4.9", "+5.0", "+5.1", "+5.2", "+5.3")
    beside_bad = verdicts(folder, {"baseline": {"recipe": "w4a8-bad"}}, rows)
    assert beside_bad[rows[0]["id"]].words.endswith(", better")
    planned = [Planned.of(row) for row in rows]
    assert baseline_of(rows[3], planned, {"recipe": "w4a8-bad"}).seed == 1  # of its own seed
    assert baseline_of(rows[3], planned, {"recipe": "w8a8"}) is planned[0]  # none of its seed: the model's first row


def test_a_baseline_is_found_by_every_name_that_it_was_asked_for(folder: Path) -> None:
    """'on Pile' changes nothing and 'on books' equals 'twice', so both are measured once, under another name."""
    asked = {"as it is": ["as it is", "on Pile"], "on books": ["on books", "twice"]}
    planned = [
        Planned(f"{seed} {name}", "", "m", seed, [("r", each) for each in names])
        for name, names in asked.items()
        for seed in (0, 1)
    ]
    row = {"model": "m", "seed": 1}
    for wanted, expected in (("on Pile", "1 as it is"), ("twice", "1 on books"), (None, "1 as it is")):
        assert baseline_of(row, planned, {"recipe": "r", "override": wanted}).id == expected
    assert baseline_of(row, planned, {"recipe": "r", "override": "of other recipes"}).id == "1 as it is"


def test_a_baseline_that_was_not_measured_is_not_replaced_by_another(folder: Path, tmp_path: Path) -> None:
    study, rows = read_study(folder)
    lost = Planned(
        "lost", "m, quamba, as it is, seed 0", rows[0]["model"], 0, [("quamba", "as it is")], "m: <too short>"
    )
    write_plan(folder, study, [lost, *map(Planned.of, rows)])
    for wanted in ({"recipe": "quamba", "override": None}, None):  # named, or the model's first row
        found = verdicts(folder, study | {"baseline": wanted}, rows)
        assert found[rows[0]["id"]].words == "its baseline is not measured"
    page = page_of(folder, tmp_path / "page.html")
    assert "1 of 5 rows are missing" in page and "m: &lt;too short&gt;" in page


def test_error_by_distance_is_drawn_of_what_was_decoded_beside_a_float_model(folder: Path) -> None:
    rows = read_study(folder)[1]
    made = by_position(rows, 1)
    assert made is not None
    assert [line.name for line in made.data] == ["w8a8", "w4a8-bad", "w4a8-bad, seed 1"]  # float has no KL
    assert made.data[0].x == (64.0, 192.0, 384.0) and made.data[0].y == pytest.approx((0.001, 0.002, 0.003))
    assert made.data[0].error_y.array == pytest.approx((0.0, 0.002, 0.001))
    assert by_position(rows, 0) is None  # in parallel no span was kept here
    assert "KL by tokens since the window began" in page_of(folder, folder / "page.html")


def test_the_page_is_whole_and_names_are_escaped(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder, tmp_path / "page.html")
    visible = outside_scripts(page)
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page[: page.index("<body>")] + visible)
    assert "m&lt;/script&gt;&lt;1&gt;" in visible and "m</script><1>" not in visible and "a &lt;b&gt;test" in visible
    assert visible.count("not significant") >= 1 and "SRAM for the scales of u" in visible
    assert page == page_of(folder, tmp_path / "again.html")  # same rows, same page


def test_nothing_but_sensitivity_is_a_page_too(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "s", {}, [], [sensitivity("cell")])
    assert "sensitivity-1" in (tmp_path / "page.html").read_text()


def test_bad_places_and_files(tmp_path: Path, folder: Path) -> None:
    check_out(tmp_path / "new.html")
    check_out(None)
    for out in (tmp_path, tmp_path / "none" / "page.html"):
        with pytest.raises(SquamataError, match="--out"):
            check_out(out)
    (folder / "torn.json").write_text("{")
    with pytest.raises(SquamataError, match=r"torn\.json"):
        read_others(folder)


def test_pareto_front_by_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(draw.randint(1, 12))]
        front = {points[place] for place in pareto_front(points)}
        undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        assert front == undominated and len(pareto_front(points)) == len(front)


def test_spread_over_seeds(folder: Path) -> None:
    rows = read_study(folder)[1]
    values = [row["perplexity"] for row in rows[2:]]
    assert seed_spread(rows) == {("m</script><1>", "w4a8-bad"): values}
    assert seed_spread(rows, 1, "kl") == {("m</script><1>", "w4a8-bad"): [0.05, 0.06]}
    page = page_of(folder, folder / "page.html")
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert f"<td>{mean:.4f} ± {deviation:.4f}</td>" in page and "<td>0.055000 ± 0.007071</td>" in page


def test_kl_is_compared_too_and_in_every_evaluation(tmp_path: Path) -> None:
    """By hand: KL of 0.02 beside 0.01 in the second evaluation, the same in the first."""
    tokens = np.full(8, 100.0)
    rows = []
    with locked(tmp_path):
        for name, decoded in (("w8a8", 0.01), ("w4a8", 0.02)):
            row, _ = row_of(name, 0.01)
            sums = [UnitSums("documents", tokens, 3 * tokens, kl * tokens) for kl in (0.01, decoded)]
            append_row(tmp_path, row, pack_sums(0, sums[0]) | pack_sums(1, sums[1]))
            rows.append(row)
        write_plan(tmp_path, {"name": "two"}, [Planned.of(row) for row in rows])
    second = rows[1]["id"]
    alike = verdicts(tmp_path, {}, rows, 0, "kl")[second]
    assert (alike.words, alike.verdict) == ("+0.0 %, not significant", "not significant")
    worse = verdicts(tmp_path, {}, rows, 1, "kl")[second]
    assert worse.words == "+100 %, worse" and worse.percent == (pytest.approx(100), (pytest.approx(100),) * 2)
    better = verdicts(tmp_path, {"baseline": {"recipe": "w4a8"}}, rows, 1, "kl")[rows[0]["id"]]
    assert better.words == "-50 %, better" and better.percent[1] == (pytest.approx(-50),) * 2
    made = differences(rows, verdicts(tmp_path, {}, rows, 1, "kl"), "kl", "some text")
    assert made.data[0].x == (pytest.approx(100),) and made.layout.title.text.startswith("some text: KL beside")
    page = page_of(tmp_path, tmp_path / "page.html")
    assert "+100 %, worse" in page and "+0.0 %, not significant" in page and "token, some &lt;text&gt;, rec" in page


def test_a_difference_that_is_not_significant_has_no_colour(folder: Path) -> None:
    rows = read_study(folder)[1]
    made = pairs(rows, sums_of(folder, rows)).data[0]
    assert made.text[1][0] == "·" and made.z[1][0] == 0 and made.customdata[1][0] != 0
    assert made.text[2][0].startswith("+5.") and made.z[2][0] == made.customdata[2][0] == pytest.approx(5.1, abs=0.2)


def test_what_is_in_no_layer_is_told_above_the_heat_map() -> None:
    found = sensitivity("cell")
    found["rows"].append({"unit": "head.in", "kl": 0.0321, "kl_ci": None, "perplexity": 9.0, "verdict": "worse"})
    made = site_figures.sensitivity(found)
    assert "outside the layers: KL of head.in 0.032" in made.layout.title.text
    assert made.data[0].y == ("u", "x") and np.shape(made.data[0].z) == (2, 2)


def test_a_rankings_colours_say_the_verdict() -> None:
    found = sensitivity("layer")
    found["rows"][1]["verdict"] = "not significant"
    assert site_figures.sensitivity(found).data[0].marker.color == ("#b5493b", "#9aa5ab")


def test_zeroed_channels_are_drawn_with_their_interval() -> None:
    row = OUTLIERS["zeroed"][0] | {"kl_ci": [0.15, 0.3]}
    outliers, at_random = site_figures.zeroed(OUTLIERS | {"zeroed": [row]}).data
    assert outliers.y == (0.2,) and outliers.error_y.array == pytest.approx((0.1,)) and at_random.y == (0.01,)
    assert outliers.error_y.arrayminus == pytest.approx((0.05,))


def test_beside_float_all_kl_is_more_and_nothing_is_said(tmp_path: Path) -> None:
    ones = np.ones(8)
    with locked(tmp_path):
        rows = [row_of("float", 0.0)[0], row_of("w8a8", 0.01)[0]]
        for row in rows:
            append_row(tmp_path, row, pack_sums(0, UnitSums("documents", ones, ones, row["kl"] * ones)))
    assert verdicts(tmp_path, {}, rows, 0, "kl")[rows[1]["id"]].words == ""


def test_names_of_points_never_cover_one_another() -> None:
    draw = random.Random(1)
    for _ in range(40):
        points = [(draw.random(), draw.choice((0.1, draw.random()))) for _ in range(draw.randint(1, 30))]
        named = [(number, "x" * draw.randint(3, 40)) for number in range(len(points))]
        places = place_names(points, named)
        drawn = pixels(points)
        boxes = [
            box_of(drawn[number], words, place)
            for (number, words), place in zip(named, places, strict=True)
            if place is not None
        ]
        assert places[0] is not None and boxes
        for one, other in combinations(boxes, 2):
            assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
    assert place_names([(1.0, 1.0)], [(0, "alone")]) == [PLACES[0]]
    assert place_names([], []) == []


@pytest.mark.parametrize(("values", "steps"), [((4e-3, 0.02), "D1"), ((1e-3, 0.3), "D2"), ((1e-7, 1.0), 1), ((), "D1")])
def test_logarithmic_axes_say_whole_numbers(values: tuple[float, ...], steps: str | int) -> None:
    assert logarithmic((*values, 0.0)) == {"type": "log", "tickformat": "~g", "dtick": steps}


def draw(page: Path, *options: str) -> str:
    """What the browser makes of a page; no name can be looked up, so whatever is loaded from elsewhere fails."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000", "--window-size=1200,900"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@NEEDS_BROWSER
def test_a_browser_draws_every_plot(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder, tmp_path / "page.html")
    drawn = draw(tmp_path / "page.html", "--dump-dom")
    expected = page.count("Plotly.newPlot(") - page.count('"Plotly.newPlot(')
    plots = re.findall(r'<div id="([a-z]+-\d+)" class="plotly-graph-div js-plotly-plot"', drawn)
    assert len(set(plots)) == len(re.findall(r'<div id="[a-z]+-\d+" class="plotly-graph-div"', page)) >= 12
    assert expected >= len(plots)
    for name in plots:
        part = drawn[drawn.index(f'id="{name}"') :][:4_000_000]
        assert 'class="main-svg"' in part[: part.index("</svg>") + 6]
    assert 'id="failures"' not in drawn
    assert "not significant" in drawn and "heatmaplayer" in drawn and "barlayer" in drawn


@NEEDS_BROWSER
def test_a_browser_tells_what_could_not_be_drawn(folder: Path, tmp_path: Path) -> None:
    """The check itself works: a page with a broken figure and a missing file says so."""
    page = page_of(folder, tmp_path / "page.html")
    broken = page.replace("</main>", "<script>Plotly.newPlot(nothing)</script><img src='missing.png'></main>")
    (tmp_path / "page.html").write_text(broken)
    drawn = draw(tmp_path / "page.html", "--dump-dom")
    told = drawn[drawn.index('id="failures"') :]
    assert "nothing is not defined" in told and "missing.png" in told[: told.index("</p>")]
