"""One table per bench session; ``--benchmark-disable`` (CI) runs every case once and times nothing."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import torch

from tautorch.testing.bench import Table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quieter", action="store_true", help="kept rows give way only to those whose sides took less time"
    )


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Where a bench puts its rows; written to benches/results at the end of a timed session."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    option = request.config.getoption
    t = Table(timed=bool(option("benchmark_enable")), quieter=bool(option("--quieter")))
    yield t
    path = t.write(pathlib.Path(__file__).parent / "results")
    if path is not None:
        print(f"\nwritten to {path}")
