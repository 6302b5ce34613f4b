"""``int8_linear`` passes the operator suite on every kernel."""

from __future__ import annotations

from .suite import LinearSuite


class TestInt8Linear(LinearSuite):
    op = "int8_linear"
