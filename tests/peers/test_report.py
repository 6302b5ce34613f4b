"""The performance page from made-up results: all of it, the same twice, and with losses as plain as wins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benches.report.__main__ import main, report
from benches.report.plots import PLOTS, dense_ratios, spread
from benches.report.svg import Axis, density, shade

from tests.peers.made_up import results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    return tmp_path


def write(folder: Path, kept: dict[str, Any], name: str = "made-up-peers.json") -> None:
    (folder / "results" / name).write_text(json.dumps(kept))


def test_page_and_every_plot_are_made_the_same_twice(folder: Path) -> None:
    write(folder, results())
    first = {path: path.read_bytes() for path in report(folder / "results", folder / "docs")}
    assert {path.stem for path in first} == {"performance", *PLOTS}
    assert first == {path: path.read_bytes() for path in report(folder / "results", folder / "docs")}
    for path, content in first.items():
        if path.suffix == ".svg":
            root = ElementTree.fromstring(content)
            assert root.tag.endswith("svg") and len(root) > 20
            wide, high = (float(v) for v in root.attrib["viewBox"].split()[2:])
            for mark in root:
                x, y = (float(mark.get(n) or mark.get("c" + n) or 0) for n in ("x", "y"))
                assert 0 <= x <= wide and 0 <= y <= high, f"{path.stem}: {mark.attrib} is off the card"


def test_images_of_the_page_are_there(folder: Path) -> None:
    write(folder, results())
    report(folder / "results", folder / "docs")
    page = (folder / "docs" / "performance.md").read_text()
    images = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(images) == len(PLOTS) and all((folder / "docs" / path).is_file() for path in images)


def test_losses_and_lost_peers_are_on_the_page(folder: Path) -> None:
    kept = results()
    write(folder, kept)
    report(folder / "results", folder / "docs")
    page = (folder / "docs" / "performance.md").read_text()
    losses = [row for row in kept["rows"] if row.get("ratio", 1) < 1]
    assert 10 < len(losses) < len(kept["rows"]) / 2
    section = page.split("### Where a peer is faster")[1].split("### ")[0]
    for row in losses:
        assert f"| {row['part']} {row['case']} |" in section
    assert "DeepSparse int8: its process ended (1 rows)" in page
    assert "dense int8 against the best peer, geometric mean | 1.4 | **missed** |" in page
    assert (
        "batch 1, best pattern against our dense int8, net of an empty call | 1.2 to 8, by sparsity | met"
        in page
    )


def test_without_losses_the_page_says_so(folder: Path) -> None:
    kept = results()
    kept["rows"] = [row for row in kept["rows"] if row["part"] == "dense" and row["m"] != 16]
    write(folder, kept)
    report(folder / "results", folder / "docs")
    page = (folder / "docs" / "performance.md").read_text()
    assert "Nowhere: 63 of 63 rows are ahead of their best peer." in page
    assert "### Convolutions" not in page and not list((folder / "docs").rglob("conv.svg"))


def test_targets_of_make_bench_are_beside(folder: Path) -> None:
    write(folder, results())
    rows: list[dict[str, object]] = [
        {"bench": "core", "case": "fork-join, 2 threads", "us": 2.0, "target": "<= 1 us: MISSED"},
        {"bench": "core", "case": "other", "us": 2.0},
        {"bench": "b", "case": "2 threads, 8 rows of 512", "gain": 1.5, "target": ">= 1.8x: MISSED"},
        {"bench": "b", "case": "2 threads, 64 rows of 1024", "gain": 1.9, "target": ">= 1.8x: met"},
        {
            "bench": "b",
            "case": "4x1 90% int8 64x4096x4096",
            "us": 9.0,
            "vs fp32": "9.00x [8, 9]",
            "vs Dense": "7.02x [6.8, 7.2]",
            "target": ">= 8.0x Dense: MISSED",
        },
    ]
    write(folder, {"machine": "Made-up CPU 2 threads", "rows": rows}, "made-up.json")
    report(folder / "results", folder / "docs")
    page = (folder / "docs" / "performance.md").read_text()
    assert "| `make bench`: core, fork-join, 2 threads | <= 1 us | **missed**: 0 of 1 |" in page
    assert "core, other" not in page
    assert "| `make bench`: b, 2 threads | >= 1.8x | **missed**: 1 of 2 |" in page
    assert "| 2 threads, 8 rows of 512 | `make bench`: b | >= 1.8x | 1.5 |" in page
    assert "| 4x1 90% int8 64x4096x4096 | `make bench`: b | >= 8.0x Dense | 7.02x [6.8, 7.2] |" in page
    assert "| `make bench`: b, 4x1 90% int8 | >= 8.0x Dense | **missed**: 0 of 1 |" in page
    assert "### What is possible" not in page  # no bandwidth was measured


def test_what_is_possible_is_beside_what_was_reached(folder: Path) -> None:
    kept = results()
    dense = [row for row in kept["rows"] if row["part"] == "dense" and row["m"] in (1, 128)][:2]
    dense[0] |= {"m": 1, "k": 1000, "n": 2000, "us": 40.0, "empty_us": 5.0, "peak_gops": 500, "ratio": 1.5}
    dense[1] |= {"m": 100, "k": 1000, "n": 2000, "us": 900.0, "empty_us": 5.0, "peak_gops": 500, "ratio": 1.1}
    kept["rows"] = dense
    write(folder, kept)
    rows = [{"bench": "b", "case": "read", "GB_s": 100}, {"bench": "b", "case": "read", "GB_s": 20}]
    write(folder, {"machine": "Made-up CPU 2 threads", "rows": rows}, "made-up.json")
    report(folder / "results", folder / "docs")
    page = (folder / "docs" / "performance.md").read_text()
    # 5 + 2 MB at 100 GB/s = 25 us of 40; 5 + 400 MOP at 500 GOPS = 805 us of 900.
    assert "| 1 | 1.50 | 2.40 | 62% |" in page
    assert "| 100 | 1.10 | 1.23 | 89% |" in page
    assert "| all | 1.28 | 1.72 | 75% |" in page


def test_plots_of_a_machine_that_is_gone_go_too(folder: Path) -> None:
    write(folder, results(), "old-peers.json")
    report(folder / "results", folder / "docs")
    (folder / "results" / "old-peers.json").rename(folder / "results" / "new-peers.json")
    report(folder / "results", folder / "docs")
    assert [path.name for path in (folder / "docs" / "performance").iterdir()] == ["new"]


def test_no_results_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", "--results", str(folder / "results")])
    assert main() == 1
    said = capsys.readouterr().out
    assert "make bench-peers" in said and said.count("\n") == 1


def test_a_cell_below_one_is_red_and_above_blue() -> None:
    red, white, blue = (tuple(bytes.fromhex(shade(r)[1:])) for r in (0.5, 1.0, 2.0))
    assert red[0] > red[2] and blue[2] > blue[0] and white == (255, 255, 255)
    drawn = dense_ratios(results()["rows"])
    assert drawn is not None and shade(0.84)[:3] in drawn


def test_axes() -> None:
    axis = Axis(0.5, 0.95, 0, 100, density)
    assert axis(0.5) == 0 and axis(0.95) == pytest.approx(100)
    assert axis(0.75) == pytest.approx(axis(0.875) - axis(0.75))  # each step halves what is left
    assert axis(0.99) == pytest.approx(100)  # held within the plot


def test_labels_are_kept_apart() -> None:
    assert spread([10, 12, 40], 15) == [10, 25, 40]
