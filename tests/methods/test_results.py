"""Rows from made-up results: how they are judged, and the table, JSON and page that are made of them."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benches.methods import page, plots
from benches.methods.claims import Claim, Relation, Row, judge, shown
from benches.methods.jobs import Job, Outcome, Result
from benches.methods.results import Results, got, ingredients, table, target
from rich.console import Console


def never(**settings: Any) -> Result:
    raise AssertionError("no job runs here")


def claim(relation: Relation = ">=", bound: float = 0.5, unit: str = "%", task: str = "text") -> Claim:
    return Claim(
        task=task,
        title="a <method> of [some] kind & more",
        measured="share",
        relation=relation,
        bound=bound,
        unit=unit,
        jobs={seed: {"mine": Job("mine", never, {"seed": seed, "lr": 0.25})} for seed in (0, 1, 2)},
        value=lambda results: results["mine"]["value"],
        parts=lambda results: {"before": 4.0, "after": results["mine"]["value"]},
        parts_unit="perplexity",
        note="as <noted>",
    )


def outcome(made: Claim, values: list[float]) -> Outcome:
    jobs = [by_name["mine"] for by_name in made.jobs.values()]
    return Outcome({job.key: {"value": value} for job, value in zip(jobs, values, strict=True)})


def row(relation: Relation = ">=", values: tuple[float, ...] = (0.4, 0.5, 0.6), **options: Any) -> Row:
    made = claim(relation, **options)
    return judge(made, outcome(made, list(values)))


def test_mean_and_spread_over_the_seeds() -> None:
    made = row(values=(0.4, 0.5, 0.9))
    assert made.mean == pytest.approx(0.6)
    assert made.spread == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert made.part("after") == pytest.approx((0.6, 0.4, 0.9))
    assert made.settings == {"mine": {"lr": 0.25}}


@pytest.mark.parametrize(
    ("relation", "bound", "met"),
    [
        (">=", 0.5, True),
        (">=", 0.51, False),
        ("<=", 0.5, True),
        ("<=", 0.49, False),
        ("<", 0.5, False),
        ("<", 0.51, True),
        (">", 0.5, False),
        (">", 0.49, True),
    ],
)
def test_the_mean_is_judged(relation: Relation, bound: float, met: bool) -> None:
    made = row(relation, bound=bound)
    assert made.met is met
    assert made.verdict == ("met" if met else "missed")


def test_a_failed_job_leaves_its_row_unjudged_and_says_why() -> None:
    made = claim()
    results = outcome(made, [0.9, 0.9, 0.9])
    lost = made.jobs[1]["mine"].key
    del results.results[lost]
    results.failed[lost] = "mine: ValueError: out of luck"
    judged = judge(made, results)
    assert judged.met is None and judged.verdict == "failed"
    assert judged.failed == "seed 1: mine: ValueError: out of luck"
    assert set(judged.values) == {"0", "2"}


def test_a_quick_run_judges_nothing() -> None:
    made = claim()
    judged = judge(made, outcome(made, [0.9, 0.9, 0.9]), judged=False)
    assert judged.verdict == "not judged" and judged.parts


def test_a_row_that_lacks_a_seed_stays_open() -> None:
    made = claim()
    results = outcome(made, [0.9, 0.8, 0.9])
    del results.results[made.jobs[1]["mine"].key]
    found = judge(made, results)
    assert found.verdict == "not judged" and found.values == {"0": 0.9, "2": 0.9}


def test_figures_are_shown_in_their_units() -> None:
    assert shown(0.1234, "%") == "12.3 %"
    assert shown(1.234, "%") == "123 %"
    assert shown(-0.00056, "points") == "-0.056 points"
    assert shown(36.25, "×") == "36.2×"
    assert shown(math.nan, "%") == "–"
    made = row()
    assert (target(made), got(made)) == ("≥ 50 %", "50 % ± 10 %")
    assert ingredients(made) == "before 4, after 0.5"


@pytest.fixture
def results() -> Results:
    rows = [row(), row("<=", bound=0.1, task="digits"), row("<=", bound=0.1, unit="points", task="agent")]
    return Results(rows, [0, 1, 2], 120.0, {"CPU": "a <fast> one", "date": "2026-01-01"})


def test_json_is_read_back(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "methods.json"
    results.write(path)
    assert Results.read(path) == results
    assert list(path.parent.iterdir()) == [path]
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match=r"the format of .* must be 1, got 0"):
        Results.read(path)


def test_table_shows_every_row_as_it_is(results: Results) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(table(results, 200))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("a <method> of [some] kind & more") == 3
    assert text.count("missed") == 2 and "≥ 50 %" in text and "before 4, after 0.5" in text
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(table(results, 80))
    assert "before 4" not in narrow.file.getvalue()  # type: ignore[attr-defined]


def test_page_is_whole_and_escaped(results: Results) -> None:
    html = page.render(results)
    assert "<method>" not in html and "<noted>" not in html and "<fast>" not in html
    assert "a &lt;method&gt; of [some] kind &amp; more" in html
    assert "1 of 3 targets met" in html and "lr=0.25" in html
    assert not re.search(r"(?:src|href)=", html) and html.count("http") == html.count('xmlns="http')
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        dots = [mark for mark in ElementTree.fromstring(figure).iter() if mark.tag.endswith("circle")]
        assert len(dots) == 6  # two parts, three seeds


@pytest.mark.parametrize("values", [(0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (-1.0, 2.0, 3.0), (1.0, 50.0, 4000.0)])
def test_plots_hold_every_value_inside(values: tuple[float, ...]) -> None:
    made = row(values=values)
    axis = plots._axis([value for parts in made.parts.values() for value in parts.values()])
    ticks = plots._ticks(axis)
    assert 1 <= len(ticks) <= 8 and all(axis.low <= tick <= axis.high for tick in ticks)
    for mark in ElementTree.fromstring(plots.strip(made, "title")).iter():
        if mark.tag.endswith("circle"):
            assert axis.start <= float(mark.attrib["cx"]) <= axis.end
