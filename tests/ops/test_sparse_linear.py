"""``sparse_linear`` passes the operator suite on every kernel."""

from __future__ import annotations

from .suite import LinearSuite


class TestSparseLinear(LinearSuite):
    op = "sparse_linear"
