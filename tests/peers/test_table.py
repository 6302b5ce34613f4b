"""The results file of `make bench`: what a run replaces and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tautorch.testing.bench import Table


def run(folder: Path, us: float, ratio: str, *, quieter: bool, **more: Any) -> list[dict[str, Any]]:
    table = Table(timed=True, quieter=quieter)
    table.add("b", "a", us=us, **{"vs peer": f"{ratio}x [1.00, 9.00]"}, **more)
    path = table.write(folder)
    assert path is not None
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_a_run_replaces_its_rows_and_keeps_others(tmp_path: Path) -> None:
    other = Table(timed=True)
    other.add("b", "other", one_us=2, two_us=1)
    other.write(tmp_path)
    run(tmp_path, 10.0, "2.00", quieter=False)
    rows = run(tmp_path, 20.0, "2.00", quieter=False)
    assert [(r["case"], r.get("us")) for r in rows] == [("other", None), ("a", 20.0)]
    assert Table(timed=False).write(tmp_path) is None


def test_quieter_keeps_the_row_whose_sides_together_took_less(tmp_path: Path) -> None:
    def us(*args: Any, **more: Any) -> float:
        (row,) = run(tmp_path, *args, quieter=True, **more)
        return float(row["us"])

    assert us(10.0, "2.00") == 10.0  # 30 together
    assert us(9.0, "3.00") == 10.0  # 36: ours gained, the machine did not
    assert us(14.0, "1.00") == 14.0  # 28
    assert us(50.0, "1.00", note="another column") == 50.0
    assert us(48.0, "1.00", note="another column") == 48.0
    assert us(49.0, "1.00", note="another column") == 48.0


def test_quieter_reads_ratios_with_and_without_an_interval(tmp_path: Path) -> None:
    for us, ratio, text, left in (
        (10.0, 1.5, "2.00x", 10.0),
        (11.0, 1.0, "1.50x [1, 2]", 11.0),
        (12.0, 1.5, "2", 11.0),
    ):
        table = Table(timed=True, quieter=True)
        table.add("b", "a", us=us, ratio=ratio, **{"vs peer": text, "vs peer, net": 99.0})
        path = table.write(tmp_path)
        assert path is not None and json.loads(path.read_text())["rows"][0]["us"] == left


def test_quieter_goes_by_both_times_of_a_thread_pair(tmp_path: Path) -> None:
    def gain(one: int, two: int) -> float:
        table = Table(timed=True, quieter=True)
        table.add("b", "2 threads", one_us=one, two_us=two, gain=one / two)
        path = table.write(tmp_path)
        assert path is not None
        return float(json.loads(path.read_text())["rows"][0]["gain"])

    assert gain(100, 50) == 2.0
    assert gain(120, 40) == 2.0
    assert gain(90, 50) == 1.8


def test_quieter_goes_by_the_call_and_the_read_beside_it(tmp_path: Path) -> None:
    for us, read_us, left in ((30.0, 24.0, 30.0), (29.0, 28.0, 30.0), (31.0, 20.0, 31.0)):
        table = Table(timed=True, quieter=True)
        table.add("b", "read", us=us, read_us=read_us, share="80%")
        path = table.write(tmp_path)
        assert path is not None and json.loads(path.read_text())["rows"][0]["us"] == left


def test_quieter_replaces_rows_without_two_times_and_stays_said(tmp_path: Path) -> None:
    for us, quieter in ((10.0, True), (20.0, True), (30.0, False)):
        table = Table(timed=True, quieter=quieter)
        table.add("b", "read", us=us, share="80%")
        path = table.write(tmp_path)
        assert path is not None
        kept = json.loads(path.read_text())
        assert kept["rows"][0]["us"] == us and kept["rows"][0]["date"] and kept["quieter"] is True
