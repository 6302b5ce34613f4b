"""Whose the cores are, with looks and clocks that say what they are told."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from benches.peers.__main__ import parse
from benches.peers.arena import Contestant, contest
from benches.peers.results import Results
from benches.report.page import _shared_host

from tautorch.testing import bench, cores
from tautorch.testing.bench import Table, samples_in_turns
from tautorch.testing.cores import APART, SHARED, Cores


class Told:
    """Looks that take what they are told, each and every wait a second of the clock."""

    def __init__(self, looks: list[float], joins: list[float | None] | None = None) -> None:
        self.looks, self.joins, self.now = list(looks), joins, 0.0

    def cores(self, patience: float) -> Cores:
        return Cores(patience, look=self.look, join=self.join, clock=lambda: self.now, sleep=self.sleep)

    def join(self) -> float | None:
        return None if self.joins is None else self.joins.pop(0)

    def look(self) -> float:
        self.now += 1.0
        return self.looks.pop(0)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def timer(log: list[float], times: list[float]) -> Contestant:
    def slice_(seconds: float) -> list[float]:
        log.append(seconds)
        return [times.pop(0)]

    return Contestant("a", {"": slice_})


def test_a_slice_is_taken_again_until_the_cores_are_own_before_and_after_it() -> None:
    shared, own = 2 * SHARED, 1.0
    told = Told([own, shared, shared, own, shared, own, own])
    timed, _ = contest(
        [timer(log := [], [9.0, 8.0, 3.0])], rounds=1, seconds=0.1, cores=told.cores(100.0)
    )  # own, 9, shared; shared own, 8, shared; own, 3, own
    assert timed["a"].slices == (3.0,) and len(log) == 3 and not told.looks


def test_a_slice_of_cores_that_lie_apart_is_taken_again() -> None:
    near, apart = 1.0, 1.1 * APART
    told = Told([1.0] * 6, [near, apart, None, apart, near, near])
    timed, _ = contest(
        [timer(log := [], [9.0, 8.0, 3.0])], rounds=1, seconds=0.1, cores=told.cores(100.0)
    )  # near, 9, apart; one thread, 8, apart; near, 3, near
    assert timed["a"].slices == (3.0,) and len(log) == 3 and not told.joins


def test_a_join_is_there_where_two_threads_are() -> None:
    with bench.threads(2):
        two = cores.join()
    with bench.threads(1):
        assert cores.join() is None
    assert two is not None and two > 0.0


def test_which_way_is_the_fastest_is_told_by_own_cores_too() -> None:
    shared = 2 * SHARED
    told = Told([1.0, shared, 1.0, 1.0] + [1.0] * 20)  # the first slice of the first way was disturbed
    ways = {"a": lambda s: [a.pop(0)], "b": lambda s: [b.pop(0)]}
    a, b = [9.0, 1.0, 1.0, 1.0], [2.0, 2.0]
    timed, _ = contest([Contestant("x", ways)], rounds=1, seconds=0.1, cores=told.cores(100.0))
    assert timed["x"].way == "a" and timed["x"].slices == (1.0,) and not a and not b


def test_patience_ends_and_what_was_measured_last_stands() -> None:
    told = Told([1.0] + [2 * SHARED] * 50)
    cores_ = told.cores(5.0)
    assert cores_.own()
    timed, _ = contest([timer([], [7.0] * 20)], rounds=2, seconds=0.1, cores=cores_)
    assert timed["a"].slices == (7.0, 7.0) and cores_.given_up == 2
    assert 6.0 <= told.now <= 12.0


def test_a_run_looks_first_if_it_looks_at_all() -> None:
    told = Told([2.0, 1.0, 2.0, 9.0])
    cores_ = told.cores(1.0)
    cores_.learn(3.0)
    assert cores_.fastest == 1.0 and told.looks == [9.0] and not cores_.own()
    idle = Told([])
    idle.cores(0.0).learn(3.0)


def test_without_patience_nobody_looks() -> None:
    told = Told([])
    timed, _ = contest([timer([], [1.0, 2.0])], rounds=2, seconds=0.1, cores=told.cores(0.0))
    assert timed["a"].slices == (1.0, 2.0)


def test_samples_beside_other_guests_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WINDOW_S", 1e-9)  # one round each
    own, shared = [1.0, 1.0], [1.0, 2 * SHARED]
    told = Told(own * 3 + shared + own * 4)
    calls = {"a": 0, "b": 0}

    def side(name: str) -> None:
        calls[name] += 1

    samples = samples_in_turns(
        {name: lambda name=name: side(name) for name in calls},  # type: ignore[misc]
        seconds=0.0, sample=1e-9, cores=told.cores(100.0),
    )  # fmt: skip
    assert not told.looks and {name: len(times) for name, times in samples.items()} == {"a": 7, "b": 7}
    assert calls == {
        "a": 4 + 8 * 2,
        "b": 4 + 8 * 2,
    }  # 4 to see how long one takes


def test_rows_say_how_many_of_their_own_windows_were_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WINDOW_S", 1e-9)
    told = Told([1.0] + [2 * SHARED] * 50)
    table = Table(timed=True, cores=told.cores(3.0))
    assert table.cores.own()
    ratios = table.compare("b", "shared", lambda: None, {"peer": lambda: None}, seconds=0.0)
    told.looks = [1.0] * 50
    table.in_turns({"a": lambda: None}, seconds=0.0)
    table.add("b", "own")
    assert [row["shared_slices"] for row in table.rows] == [7, 0] and ratios["peer"] > 0.0
    patient = Table(timed=True)
    patient.compare("b", "nobody looks", lambda: None, {"peer": lambda: None}, seconds=0.0)
    assert "shared_slices" not in patient.rows[0]


def test_a_row_whose_patience_ended_replaces_none_with_fewer_shared_slices(tmp_path: Path) -> None:
    def kept(*shared: int | None) -> list[float]:
        """The row that is left after each of some runs, by what they took."""
        left = []
        for us, slices in enumerate(shared):
            table = Table(timed=True)
            figures = {} if slices is None else {"shared_slices": slices}
            table.rows.append({"bench": "b", "case": "a", "us": float(us), **figures})
            path = table.write(tmp_path)
            assert path is not None
            (row,) = json.loads(path.read_text())["rows"]
            left.append(row["us"])
            Results(file, {"versions": {}}).add(
                {"part": "p", "case": "a", "us": float(us), "peers": {}, "own": {}, **figures}
            )
            assert json.loads(file.read_text())["rows"][0]["us"] == row["us"]
        return left

    file = tmp_path / "peers.json"
    assert kept(None, 3, 0, 2, 0, None) == [0.0, 0.0, 2.0, 2.0, 4.0, 5.0]
    for path in tmp_path.iterdir():
        path.unlink()
    assert kept(5, 6, 4, 4, 0) == [0.0, 0.0, 2.0, 2.0, 4.0]


def test_the_fastest_look_so_far_is_what_own_cores_take() -> None:
    cores_ = Told([2.0, 2.1, 1.0, 2.0, 1.0 * SHARED]).cores(1.0)
    assert [cores_.own() for _ in range(5)] == [True, True, True, False, True]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads to CPUs")
def test_a_look_leaves_the_process_on_all_its_cpus() -> None:
    before = os.sched_getaffinity(0)
    assert 0.0 < cores.look() < math.inf
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_patience_is_a_number_of_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--patience", seconds])
    assert "--patience" in capsys.readouterr().err


def test_the_page_tells_rows_of_own_cores_from_others() -> None:
    rows = [{"part": "conv", "shared_slices": 0}, {"part": "conv", "shared_slices": 2}, {"part": "dense"}]
    text = _shared_host({"rows": rows, "quieter": True})
    assert "Of 2 rows (conv)" in text and "1 of these rows" in text and "The other rows are each" in text
    assert "other rows" not in _shared_host({"rows": rows[:2], "quieter": True})
    assert _shared_host({"rows": rows[2:]}, None) == ""
    ours = {"rows": [{"bench": "int8_linear", "shared_slices": 0}]}
    text = _shared_host({"rows": rows, "quieter": True}, ours)
    assert "Of 3 rows (conv, make bench: int8_linear)" in text and "2 of these rows" in text
    assert "no row has such a slice left" in _shared_host({"rows": rows[:1]}, ours)
