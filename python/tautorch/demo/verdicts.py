"""What the demo promises, what it aims for, and whether it did."""

from __future__ import annotations

from tautorch.compress import Check, Report, Speedup, Stage
from tautorch.compress._format import format_share
from tautorch.demo.verify import Reload

TEACHER_ACCURACY = 0.98
ACCURACY_LOSS = 0.01
COMPILED_SHARE = 0.80
SMALLER = {"teacher": 30.0, "student": 5.0}
FASTER = {("teacher", 1): 5.0, ("teacher", 64): 5.0, ("student", 1): 1.0, ("student", 64): 1.3}


def judge(report: Report, reload: Reload, *, timed: bool) -> list[Check]:
    """All checks of a report whose stages are teacher, student, ..., and last the compiled model."""
    stages = {stage.name: stage for stage in report.stages}
    compiled = report.stages[-1]
    checks = [_accuracy(stages["teacher"], compiled), _reload(reload)]
    if timed:
        checks += [_never_slower(speedup) for speedup in report.speedups if speedup.peer in SMALLER]
    else:
        checks.append(Check("never slower, end to end", "≥ 1.0×", "not judged: --no-timing", None))
    checks.append(_teacher(stages["teacher"]))
    share = report.compiled_share
    checks.append(
        Check(
            "student's parameters in compiled layers",
            f"≥ {COMPILED_SHARE * 100:g} %",
            format_share(share),
            share >= COMPILED_SHARE,
            "target",
        )
    )
    for peer, factor in SMALLER.items():
        ratio = stages[peer].bytes / compiled.bytes
        checks.append(_target(f"smaller than the {peer}", factor, ratio))
    for speedup in report.speedups if timed else ():
        factor = FASTER.get((speedup.peer, speedup.batch), 0.0)
        if factor:
            name = f"faster than the {speedup.peer} at batch {speedup.batch}"
            # A ratio that the noise could have made is no evidence; its lower limit is.
            checks.append(_target(name, factor, speedup.low if speedup.noisy else speedup.ratio))
    return checks


def _accuracy(teacher: Stage, compiled: Stage) -> Check:
    if teacher.accuracy is None or compiled.accuracy is None:
        raise ValueError("judge: teacher and compiled model must have their accuracy measured, got None")
    loss = teacher.accuracy.value - compiled.accuracy.value
    return Check(
        "accuracy next to the teacher's",
        f"at most {ACCURACY_LOSS * 100:g} point under",
        f"{abs(loss) * 100:.2f} points {'under' if loss > 0 else 'over'}" if loss else "the same",
        # Equal counts of images must not fail by a rounding of their quotients.
        loss <= ACCURACY_LOSS + 1e-9,
    )


def _reload(reload: Reload) -> Check:
    return Check(
        "predictions after reloading in a fresh process",
        "identical, bit for bit",
        f"{reload.same_logits} of {reload.images} logits, {reload.same_digits} digits",
        reload.identical,
    )


def _never_slower(speedup: Speedup) -> Check:
    return Check(
        f"not slower than the {speedup.peer} at batch {speedup.batch}",
        "≥ 1.0×, within the 95 % interval",
        f"{speedup.ratio:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]",
        speedup.high >= 1.0,
    )


def _teacher(teacher: Stage) -> Check:
    value = teacher.accuracy.value if teacher.accuracy else 0.0
    return Check(
        "teacher's held-out accuracy",
        f"≥ {TEACHER_ACCURACY * 100:g} %",
        f"{value * 100:.2f} %",
        value >= TEACHER_ACCURACY,
        "target",
    )


def _target(name: str, factor: float, ratio: float) -> Check:
    return Check(name, f"≥ {factor:g}×", f"{ratio:.3g}×", ratio >= factor, "target")
