"""Turns, medians and ratios, with timers that say what they are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from benches.peers.arena import Contestant, Timed, contest, ratio
from benches.peers.worker import WorkerLost


def told(times: list[float], log: list[str], name: str) -> Callable[[float], list[float]]:
    rest = list(times)

    def timer(seconds: float) -> list[float]:
        log.append(name)
        return [rest.pop(0)]

    return timer


def test_every_round_begins_with_another_contestant() -> None:
    log: list[str] = []
    names = ["a", "b", "c"]
    contestants = [Contestant(n, {"": told([1.0] * 3, log, n)}) for n in names]
    contest(contestants, rounds=3, seconds=1.0)
    assert "".join(log) == "abcbcacab"


def test_the_fastest_way_goes_on() -> None:
    log: list[str] = []
    ways = {"slow": told([3.0, 3.0], log, "slow"), "fast": told([5.0, 1.0, 1.0, 1.0], log, "fast")}
    timed, lost = contest([Contestant("a", ways, {"fast": "kernel"}, 0.01)], rounds=2, seconds=1.0)
    assert not lost and log == ["slow", "fast", "slow", "fast", "fast", "fast"]
    assert timed["a"] == Timed("a", "fast", "kernel", (1.0, 1.0), 0.01)


def test_a_slice_is_the_median_of_its_samples() -> None:
    timed, _ = contest([Contestant("a", {"": lambda s: [9.0, 1.0, 2.0]})], rounds=1, seconds=1.0)
    assert timed["a"].slices == (2.0,)


def test_ratios_are_of_one_round_so_that_drift_cancels() -> None:
    a = Timed("a", "", "", (2.0, 2.4, 2.8))
    b = Timed("b", "", "", (1.0, 1.2, 1.4))
    assert ratio(a, b).median == pytest.approx(2.0)
    assert ratio(a, b).low == pytest.approx(2.0) and ratio(a, b).high == pytest.approx(2.0)


def test_disturbed_rounds_are_left_out_of_times_and_ratios() -> None:
    a = Timed("a", "", "", (2.0, 2.0, 2.0, 2.0, 20.0))
    b = Timed("b", "", "", (1.0, 7.0, 8.0, 1.0, 1.0))
    assert a.seconds == 2.0 and b.seconds == 1.0
    assert ratio(a, b).median == pytest.approx(2.0)


def test_two_undisturbed_slices_are_enough_and_one_is_not() -> None:
    assert Timed("a", "", "", (1.0, 5.0, 5.0, 5.0)).seconds == 5.0
    assert Timed("a", "", "", (1.0, 5.0, 5.0, 1.1)).seconds == pytest.approx(1.05)


def test_without_a_common_undisturbed_round_the_ratio_is_that_of_the_times() -> None:
    a = Timed("a", "", "", (2.0, 2.0, 9.0, 9.0))
    b = Timed("b", "", "", (9.0, 9.0, 1.0, 1.0))
    assert ratio(a, b).median == ratio(a, b).low == ratio(a, b).high == pytest.approx(2.0)


def test_net_of_an_empty_call() -> None:
    a, b = Timed("a", "", "", (11e-6,)), Timed("b", "", "", (3e-6,))
    assert ratio(a, b, net_of=1e-6).median == pytest.approx(5.0)


@pytest.mark.parametrize("ways", [1, 2])
def test_who_is_lost_does_not_stop_the_others(ways: int) -> None:
    calls = 0

    def dies(seconds: float) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise WorkerLost("gone")
        return [1.0]

    lost_one = Contestant("peer", {str(i): dies for i in range(ways)})
    timed, lost = contest([lost_one, Contestant("ours", {"": lambda s: [1.0]})], rounds=4, seconds=1.0)
    assert lost == {"peer": "gone"} and list(timed) == ["ours"]
    assert len(timed["ours"].slices) == 4
