"""What breaks a promise, what misses a target, and what passes by exactly its limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tautorch.compress import Check, Layer, Proportion, Report, Speedup, Stage
from tautorch.demo import verdicts
from tautorch.demo.verify import Reload

IDENTICAL = Reload(540, 540, 540)


def make_report(correct: int = 535, ratio: float = 20.0, width: float = 0.02) -> Report:
    def layer(name: str, parameters: int, replaced: bool) -> Layer:
        return Layer(name, "Linear", "Int8Linear", "avx2", replaced, "", parameters, 4, 1)

    return Report(
        "digits",
        stages=[
            Stage("teacher", "", 1, 3_000_000, Proportion(540, 540)),
            Stage("student", "", 1, 500_000, Proportion(538, 540)),
            Stage("compact", "", 1, 400_000, Proportion(537, 540)),
            Stage("compiled", "", 1, 100_000, Proportion(correct, 540)),
        ],
        layers=[layer("a", 80, True), layer("b", 20, False)],
        speedups=[
            Speedup("compiled", peer, batch, ratio, ratio * (1 - width), ratio * (1 + width))
            for peer in ("teacher", "student", "compact")
            for batch in (1, 64)
        ],
    )


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.passed is False]


def test_all_is_well() -> None:
    checks = verdicts.judge(make_report(), IDENTICAL, timed=True)
    assert failed(checks) == []
    assert all(check.passed for check in checks)
    # accuracy, reload, four times never slower; teacher, share, two sizes, four speeds
    assert [check.kind for check in checks].count("promise") == 6
    assert [check.kind for check in checks].count("target") == 8


@pytest.mark.parametrize(("correct", "expected"), [(535, True), (534, False)])
def test_one_point_of_540_images_is_five(correct: int, expected: bool) -> None:
    report = make_report(correct)
    report.checks = verdicts.judge(report, IDENTICAL, timed=True)
    assert report.kept_promises is expected


def test_exactly_one_point_is_allowed() -> None:
    report = make_report()
    report.stages[0] = replace(report.stages[0], accuracy=Proportion(100, 100))
    report.stages[-1] = replace(report.stages[-1], accuracy=Proportion(99, 100))
    assert failed(verdicts.judge(report, IDENTICAL, timed=True)) == []


@pytest.mark.parametrize("reload", [Reload(540, 539, 540), Reload(540, 540, 539)])
def test_other_predictions_break_a_promise(reload: Reload) -> None:
    report = make_report()
    report.checks = verdicts.judge(report, reload, timed=True)
    assert not report.kept_promises


@pytest.mark.parametrize(("ratio", "expected"), [(0.9, False), (0.99, True), (1.2, True)])
def test_slower_breaks_a_promise_beyond_the_noise(ratio: float, expected: bool) -> None:
    report = make_report(ratio=ratio)
    report.checks = verdicts.judge(report, IDENTICAL, timed=True)
    assert report.kept_promises is expected
    assert "faster than the teacher at batch 64" in failed(report.checks)


@pytest.mark.parametrize(("width", "missed"), [(0.1, []), (0.9, ["faster than the teacher at batch 1"])])
def test_a_noisy_ratio_counts_by_its_lower_limit(width: float, missed: list[str]) -> None:
    report = make_report()
    report.speedups = [Speedup("compiled", "teacher", 1, 20.0, 20 * (1 - width), 20 * (1 + width))]
    checks = verdicts.judge(report, IDENTICAL, timed=True)
    assert failed(checks) == missed


def test_a_slower_compact_model_is_no_promise() -> None:
    report = make_report()
    report.speedups = [
        replace(item, ratio=0.5, low=0.4, high=0.6) if item.peer == "compact" else item
        for item in report.speedups
    ]
    assert failed(verdicts.judge(report, IDENTICAL, timed=True)) == []


def test_without_timing_speed_is_not_judged() -> None:
    report = make_report(ratio=0.1)
    report.checks = verdicts.judge(report, IDENTICAL, timed=False)
    assert report.kept_promises
    assert [check.name for check in report.checks if check.passed is None] == ["never slower, end to end"]


def test_targets_are_said_not_enforced() -> None:
    report = make_report()
    report.stages[-1] = replace(report.stages[-1], bytes=110_000)
    report.layers[0] = replace(report.layers[0], replaced=False)
    report.checks = verdicts.judge(report, IDENTICAL, timed=True)
    assert report.kept_promises
    assert failed(report.checks) == [
        "student's parameters in compiled layers",
        "smaller than the teacher",
        "smaller than the student",
    ]
