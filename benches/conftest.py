"""One table per bench session; ``--benchmark-disable`` (CI) runs every case once and times nothing."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import torch

from tautorch.testing.bench import Table
from tautorch.testing.cores import LEARN_S, Cores, patience


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quieter", action="store_true", help="kept rows give way only to those whose sides took less time"
    )
    parser.addoption(
        "--patience", type=patience, default=0.0, metavar="S",
        help="seconds a case may wait for cores on which no other guest of the host works (shared machines)",
    )  # fmt: skip


@pytest.fixture
def table(session_table: Table) -> Table:
    """Where a bench puts its rows."""
    session_table.begin()
    return session_table


@pytest.fixture(scope="session")
def session_table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """The rows of all benches; written to benches/results at the end of a timed session."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    option = request.config.getoption
    timed = bool(option("benchmark_enable"))
    t = Table(timed, quieter=bool(option("--quieter")), cores=Cores(option("--patience") if timed else 0.0))
    t.cores.learn(LEARN_S)
    yield t
    path = t.write(pathlib.Path(__file__).parent / "results")
    if path is not None:
        print(f"\nwritten to {path}")
