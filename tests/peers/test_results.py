"""Rows: figures, verdicts, and the file they are merged into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benches.peers import summary, table
from benches.peers.arena import Contestant, Timed
from benches.peers.results import Case, Results, Target, make_row
from rich.console import Console

CONTESTANT = {"ways": {"": lambda s: [1.0]}}


def a_case(**changes: object) -> Case:
    case = Case("dense", "1x2x3", {"m": 1}, 12.0, Contestant("ours", **CONTESTANT))
    case.peers = [Contestant("A", **CONTESTANT), Contestant("B", **CONTESTANT)]
    for name, value in changes.items():
        setattr(case, name, value)
    return case


def timed(**seconds: float) -> dict[str, Timed]:
    return {name: Timed(name, "w", "k", (s,) * 5) for name, s in seconds.items()}


def test_row_holds_times_ratios_and_the_best_peer() -> None:
    row = make_row(a_case(), timed(ours=1e-6, A=3e-6, B=2e-6), {}, threads=2)
    assert row["us"] == 1.0 and row["gops"] == 0 and row["best"] == "B" and row["ratio"] == 2.0
    assert row["peers"]["A"]["ratio"] == 3.0 and row["peers"]["A"]["us"] == 3.0
    assert row["m"] == 1 and row["kernel"] == "k"


def test_share_is_of_all_threads_peak() -> None:
    case = a_case(limits=[Contestant("peak", **CONTESTANT)], operations=1e6, share=0.6)
    row = make_row(case, timed(ours=1e-3, A=1e-3, peak=1e-9), {}, threads=2)
    assert row["peak_gops"] == 2 and row["gops"] == 1 and row["share"] == 0.5
    assert row["targets"] == [{"what": "share of peak", "want": 0.6, "got": 0.5, "met": False}]


def test_a_lost_peer_is_in_the_row_with_its_reason() -> None:
    row = make_row(a_case(lost={"A": "crashed"}), timed(ours=1e-6), {"B": "hung"}, threads=1)
    assert row["peers"] == {"A": {"lost": "crashed"}, "B": {"lost": "hung"}} and "ratio" not in row


@pytest.mark.parametrize(("want", "met"), [(2.0, True), (2.1, False)])
def test_a_target_is_held_against_the_fastest_of_its_names(want: float, met: bool) -> None:
    case = a_case(targets=[Target("best", want, ("A", "B", "absent"))])
    row = make_row(case, timed(ours=1e-6, A=3e-6, B=2e-6), {}, threads=1)
    assert row["targets"] == [{"what": "best", "want": want, "got": 2.0, "met": met}]


def test_a_target_of_several_of_ours_takes_the_fastest_net_of_an_empty_call() -> None:
    case = a_case(targets=[Target("batch 1", 4.0, ("ours",), ("A", "B"), net=True)])
    row = make_row(case, {**timed(ours=9e-6, A=3e-6, B=2e-6), **timed(**{"empty call": 1e-6})}, {}, 1)
    assert row["targets"][0]["got"] == 8.0 and row["targets"][0]["by"] == "B"


def test_a_target_with_nobody_to_compare_with_gives_no_verdict() -> None:
    case = a_case(targets=[Target("best", 1.0, ("A",))])
    assert make_row(case, timed(ours=1e-6, B=1e-6), {}, 1)["targets"] == []


def test_rows_are_merged_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "r.json"
    row = make_row(a_case(), timed(ours=1e-6, A=3e-6, B=2e-6), {}, 1)
    Results(path, {"machine": "x", "versions": {"old": "1"}}).add({**row, "case": "other"})
    second = Results(path, {"machine": "x", "versions": {"new": "2"}})
    second.add(row)
    second.add({**row, "us": 7.0})
    kept = json.loads(path.read_text())
    assert [(r["case"], r["us"]) for r in kept["rows"]] == [("other", 1.0), ("1x2x3", 7.0)]
    assert kept["versions"] == {"old": "1", "new": "2"}


def test_of_several_runs_the_quieter_row_is_kept_whoever_gains(tmp_path: Path) -> None:
    path = tmp_path / "r.json"

    def run(**seconds: float) -> float:
        Results(path, {"versions": {}}, quieter=True).add(make_row(a_case(), timed(**seconds), {}, 1))
        kept = json.loads(path.read_text())
        assert kept["quieter"]
        (row,) = kept["rows"]
        return float(row["us"])

    assert run(ours=5e-6, A=9e-6, B=9e-6) == 5.0
    assert run(ours=3e-6, A=12e-6, B=9e-6) == 5.0  # better for us, but busier
    assert run(ours=6e-6, A=4e-6, B=9e-6) == 6.0
    assert run(ours=7e-6, A=30e-6) == 7.0  # B is gone: not the same contest


def test_summary_and_table_show_losses() -> None:
    case = a_case(targets=[Target("best peer", 1.0, ("A", "B"))], lost={"C": "no wheel"})
    rows = [
        make_row(case, timed(ours=1e-6, A=2e-6, B=4e-6), {}, 1),
        {**make_row(case, timed(ours=2e-6, A=1e-6, B=4e-6), {}, 1), "case": "4x4x4"},
    ]
    text = "\n".join(summary.lines(rows))
    assert "geometric mean 1.00x" in text and "MISSED" in text and "1 of 2 met" in text
    assert "missed  4x4x4: 0.50 of 1" in text
    assert [row["case"] for row in summary.behind(rows)] == ["4x4x4"]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.show(rows, console)
    shown = console.export_text()
    assert "4x4x4" in shown and "0.50 A" in shown and "lost" in shown
