"""Every operator suite runs over its kernels, each forced in turn, and over its modes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These cases are tiny; a second thread costs more than it gives. Tests about threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
