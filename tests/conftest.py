"""Every test starts from one seed, printed when it fails, and with one thread."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch

SEED_VARIABLE = "TAUTORCH_TEST_SEED"
_BASE_SEED = int(os.environ.get(SEED_VARIABLE, "0"))


def _seed_of(nodeid: str) -> int:
    """A seed of the test's own, so that a test alone draws what it draws in the whole run."""
    return (zlib.crc32(nodeid.encode()) + _BASE_SEED) % 2**32


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, {SEED_VARIABLE}={_BASE_SEED}"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Most cases are tiny: a second thread gives nothing, and where somebody else has the other core OpenMP
    waits for it at every operator (60 s for 1 s of work, measured). Tests about threads ask for them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch, numpy and random before each test."""
    seed = _seed_of(request.node.nodeid)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for code under test that draws from numpy's global state
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """torch counts recompilations of a function for the whole process, and refuses after eight."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A numpy generator with the test's seed."""
    return np.random.default_rng(_seed_of(request.node.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        seed = _seed_of(item.nodeid)
        report.sections.append(("seed", f"seed {seed} ({SEED_VARIABLE}={_BASE_SEED})"))
    return report
