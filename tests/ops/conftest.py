"""Every operator suite runs over its kernels, each forced in turn, and over its modes."""

from __future__ import annotations

import pytest

from tautorch import dispatch
from tautorch.testing.cases import MODES


def kernel_parameters(op: str) -> list[object]:
    """The CPU kernels of ``op``; those that this machine cannot run are skipped with their reason."""
    problem = dispatch.Problem(op, "cpu", 64, 64)
    reasons = dispatch.refusals(problem)
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=f"{op}: {name}: {reason}")] if reason else [])
        for name, reason in reasons.items()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.cls, "op", None)
    if op is None:
        return
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernel_parameters(op))
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES[op])
