"""Contract suites run once for each of their class's variants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(metafunc.cls.variants))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These cases are tiny; a second thread costs more than it gives. Tests about threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
