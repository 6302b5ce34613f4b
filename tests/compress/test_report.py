"""The report: its numbers, its round trip, what the terminal and the page show."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tautorch.compress import Check, Layer, Proportion, Report, Speedup, Stage, describe_environment
from tautorch.compress._format import format_accuracy, format_bytes, format_seconds, format_share
from tautorch.compress.page import render


def make_report() -> Report:
    return Report(
        "Digits <teacher & student>",
        stages=[
            Stage("teacher", "big", 2_000_000, 8_000_000, Proportion(538, 540), {1: 1e-3, 64: 20e-3}),
            Stage("student", "distilled", 400_000, 1_600_000, Proportion(536, 540), {1: 1.5e-4, 64: 2e-3}),
            Stage("compiled", "int8", 100_000, 80_000, Proportion(535, 540), {1: 6e-5, 64: 5e-4}),
        ],
        layers=[
            Layer(
                "features.0", "Conv2d 1→32, 3×3", "Int8Conv2d", "torch", False, "kept: slower <at 1> [b]",
                288, 1152, 1152,
                {"1x1x8x8": 1e-5, "64x1x8x8": 1e-4}, {"1x1x8x8": 2e-5, "64x1x8x8": 9e-5}, 0.01,
            ),
            Layer(
                "head.1", "Linear 1152→256", "LowRankLinear", "avx512vnni", True, "replaced: 3x", 294_912,
                1_179_648, 50_000,
                {"1x1152": 2e-5, "64x1152": 2e-4}, {"1x1152": 1e-5, "64x1152": 5e-5}, 0.955,
            ),
        ],
        speedups=[Speedup("compiled", "teacher", 64, 40.0, 38.0, 42.0)],
        checks=[
            Check("reload identical", "all", "540 of 540", True),
            Check("smaller", ">= 30x", "20x", False, "target"),
            Check("faster", ">= 1x", "not timed", None),
        ],
        steps_s={"train": 21.5},
        notes=["Float models in channels_last."],
        environment=describe_environment(),
        model_error=0.0321,
    )  # fmt: skip


class Page(HTMLParser):
    """Fails on unbalanced tags; collects the text and every address that is referred to."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)  # self-closing, as the marks of a chart are

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert Proportion(correct, total).interval() == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("correct", "total"), [(3, 2), (-1, 2), (0, 0)])
def test_impossible_proportion_is_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {correct} of {total}"):
        Proportion(correct, total)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_seconds(1.234e-4), "123 µs"),
        (format_seconds(999.6e-6), "1 ms"),
        (format_seconds(7.5e-8), "75 ns"),
        (format_seconds(21.53), "21.5 s"),
        (format_bytes(999), "999 B"),
        (format_bytes(88_213), "88.2 kB"),
        (format_bytes(11_130_000), "11.1 MB"),
        (format_share(0.9999), "99.9 %"),
        (format_share(1.0), "100 %"),
        (format_accuracy(Proportion(538, 540)), "99.63 % [98.7, 99.9]"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected


def test_json_round_trip(tmp_path: Path) -> None:
    report = make_report()
    report.write_json(tmp_path / "report.json")
    again = Report.from_dict(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))
    assert again == report


def test_json_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="format must be 2, got 99"):
        Report.from_dict({**make_report().to_dict(), "format": 99})


@pytest.mark.parametrize(
    ("kind", "passed", "expected"),
    [
        ("promise", True, True),
        ("promise", False, False),
        ("promise", None, True),
        ("target", False, True),
    ],
)
def test_only_a_broken_promise_fails(kind: Any, passed: bool | None, expected: bool) -> None:
    assert Report("x", checks=[Check("a", "b", "c", passed, kind)]).kept_promises is expected


def test_compiled_share_counts_parameters() -> None:
    assert make_report().compiled_share == pytest.approx(294_912 / (294_912 + 288))


def test_terminal_tells_everything() -> None:
    report = make_report()
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    report.print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "99.63 % [98.7, 99.9]", "2,000,000", "8 MB", "20 ms", "60 µs", "head.1", "avx512vnni",
        "kept: slower <at 1> [b]", "Linear 1152→256 → LowRankLinear", "1.18 MB → 50 kB", "40.00",
        "missed", "not judged", "Float models in channels_last.", "64x1152: 200 µs → 50 µs", "95.5 %",
        "model error 3.21 %",
    ):  # fmt: skip
        assert expected in text, f"{expected!r} is missing from:\n{text}"
    assert "layer        before → after" in text  # a table


@pytest.mark.parametrize("width", [60, 80, 119])
@pytest.mark.parametrize("name", ["head.1", "model.decoder.layers.11.self_attention.out_proj"])
def test_a_narrow_terminal_tells_everything_of_every_layer(width: int, name: str) -> None:
    report = make_report()
    shapes = {f"{batch}x32x768": 1e-3 * batch for batch in (1, 4, 16, 64)}
    reason = "replaced: at least as fast at every input, worst 64x32x768: 200.0 -> 50.0 us (4.00x)"
    report.layers[1] = replace(report.layers[1], name=name, reason=reason, before_s=shapes, after_s=shapes)
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    report.print(console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    start = lines.index(name)
    told = " ".join(" ".join(lines[start : lines.index("", start)]).split())
    for expected in (
        "Linear 1152→256 → LowRankLinear", "avx512vnni", "1.18 MB → 50 kB", "95.5 %", reason,
        "1x32x768: 1 ms → 1 ms 4x32x768: 4 ms → 4 ms 16x32x768: 16 ms → 16 ms 64x32x768: 64 ms → 64 ms",
    ):  # fmt: skip
        assert expected in told, f"{expected!r} is missing from:\n{told}"


def test_page_tells_shapes_of_one_batch_apart() -> None:
    report = make_report()
    times = {"1x32x768": 4e-4, "1x1x768": 1e-5}
    report.layers = [replace(report.layers[1], before_s=times, after_s=times)]
    page = Page(render(report))
    assert "head.1 1x32x768" in page.text and "head.1 1x1x768" in page.text
    assert page.tags.count("svg") == 6  # one less than for layers at two batches


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    report = make_report()
    report.write_html(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [], "tags left open"
    assert page.links == []
    assert "script" not in page.tags
    assert "http" not in html and "url(" not in html and "@import" not in html
    # Latency at two batches, size and parameters, the front, the layers at two batches.
    assert page.tags.count("svg") == 7
    assert "prefers-color-scheme: dark" in html
    for expected in (
        "Digits <teacher & student>",
        "kept: slower <at 1> [b]",
        "100×",
        "40×",
        "faster at batch 64",
        "99.07 %",
        "95.5 %",
        "Model error: 3.21 %.",
        "avx512vnni",
    ):
        assert expected in page.text, f"{expected!r} is missing"
    for environment in report.environment.values():
        assert environment in page.text


def test_page_does_not_boast_of_a_noisy_ratio() -> None:
    report = make_report()
    report.speedups = [Speedup("compiled", "teacher", 64, 500.0, 2.61, 850.0)]
    text = Page(render(report)).text
    assert "> 2.61×" in text and "500×" not in text


def test_page_without_timing_or_layers() -> None:
    report = make_report()
    report.stages = [replace(stage, latency_s={}) for stage in report.stages]
    report.layers, report.speedups = [], []
    page = Page(render(report))
    assert page.open == []
    assert page.tags.count("svg") == 2  # size and parameters
    assert "faster at batch" not in page.text


def test_page_of_an_empty_report() -> None:
    assert Page(render(Report("nothing yet"))).open == []
