"""``lowrank_conv2d`` passes the operator suite on every kernel."""

from __future__ import annotations

from .suite import ConvSuite


class TestLowRankConv2d(ConvSuite):
    op = "lowrank_conv2d"
