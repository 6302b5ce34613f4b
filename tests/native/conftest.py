"""The cross-compiled program, built once for all tests that ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .building import build_aarch64


@pytest.fixture(scope="session")
def aarch64() -> Path:
    """native_test for aarch64."""
    return build_aarch64("native_test") / "tests" / "native" / "native_test"
