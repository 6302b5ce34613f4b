"""``sparse_conv2d`` passes the operator suite on every kernel."""

from __future__ import annotations

from .suite import ConvSuite


class TestSparseConv2d(ConvSuite):
    op = "sparse_conv2d"
