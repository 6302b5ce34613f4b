"""The library under test."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.capi.library import Library
from tests.native.building import library


@pytest.fixture(scope="module")
def path() -> Path:
    return library("libtautorch.so")


@pytest.fixture(scope="module")
def lib(path: Path) -> Library:
    return Library(path)
