"""`compare` on a clock of its own: what is timed takes exactly what the test says."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable

import pytest

from tautorch import timing


class Clock:
    """Time that passes only in `work`."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, *seconds: float) -> Callable[[], None]:
        """A function whose calls take each of `seconds` in turn."""
        turns = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(turns)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_faster_one(clock: Clock) -> None:
    found = timing.compare(clock.work(3e-3), clock.work(2e-3), seconds=0.5)
    assert found.a_s == pytest.approx(3e-3)
    assert found.b_s == pytest.approx(2e-3)
    assert found.ratio == found.ratio_low == found.ratio_high == pytest.approx(1.5)
    assert found.disturbed == 0
    assert 40 < found.samples < 60


def test_short_calls_are_timed_in_bulk(clock: Clock) -> None:
    """A sample is at least 100 us long; its time is that of one call."""
    calls = [0]
    fast = clock.work(1e-6)

    def counted() -> None:
        calls[0] += 1
        fast()

    found = timing.compare(counted, clock.work(4e-6), seconds=0.05)
    assert found.a_s == pytest.approx(1e-6)
    assert found.ratio == pytest.approx(0.25)
    assert calls[0] > 100 * found.samples


def test_long_calls_are_sampled_all_the_same(clock: Clock) -> None:
    assert timing.compare(clock.work(1.0), clock.work(1.0), seconds=0.1).samples == 9


def test_sides_alternate_and_are_set_up_off_the_clock(clock: Clock) -> None:
    order: list[str] = []
    slow = clock.work(0.1)

    def setup(side: str) -> Callable[[], None]:
        def run() -> None:
            order.append(side)
            slow()

        return run

    found = timing.compare(
        clock.work(1e-3), clock.work(1e-3), seconds=0.1, setup_a=setup("a"), setup_b=setup("b")
    )
    assert found.a_s == found.b_s == pytest.approx(1e-3)
    assert "".join(order[2:10]) == "abbaabba"


def test_a_drift_of_the_machine_cancels(clock: Clock) -> None:
    """Everything becomes slower by half while b, never the faster one, is as often measured as a."""
    slowing = [1e-3 * (1 + 0.5 * i / 1000) for i in range(1000)]
    found = timing.compare(clock.work(*slowing), clock.work(*(1.1 * t for t in slowing)), seconds=0.5)
    assert found.ratio == pytest.approx(1 / 1.1, rel=2e-2)


@pytest.mark.parametrize("a_disturbed", [True, False])
def test_disturbed_samples_are_left_out(clock: Clock, a_disturbed: bool) -> None:
    """One side is held up in most of its samples, as by another process: ten times as long."""
    held = (1e-3, 1e-2, 1e-2, 1e-2, 1e-2)  # five: the warm-up calls must not eat the good one every time
    a, b = (held, (1e-3,)) if a_disturbed else ((1e-3,), held)
    found = timing.compare(clock.work(*a), clock.work(*b), seconds=0.5)
    assert found.disturbed > 0.5
    assert found.samples >= 9
    assert found.ratio == pytest.approx(1)


def test_nothing_but_disturbance_is_still_an_answer(clock: Clock) -> None:
    slower = itertools.accumulate([1e-3] * 400, lambda t, _: t * 1.5)
    found = timing.compare(clock.work(*slower), clock.work(1e-3), seconds=1e-3)
    assert found.disturbed < 1
    assert found.ratio > 1


def test_the_collector_is_put_back(clock: Clock) -> None:
    import gc

    def fails() -> None:
        raise RuntimeError("no")

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            timing.compare(clock.work(1e-3), clock.work(1e-3), seconds=0.01)
            with pytest.raises(RuntimeError):
                timing.compare(clock.work(1e-3), fails)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


@pytest.mark.parametrize(("count", "expected"), [(9, (1, 7)), (25, (7, 17)), (100, (40, 59)), (3, (0, 2))])
def test_the_interval_of_a_median(count: int, expected: tuple[int, int]) -> None:
    """Order statistics of Conover, "Practical Nonparametric Statistics", to the rounding of the normal."""
    assert timing.median_interval(count) == expected
