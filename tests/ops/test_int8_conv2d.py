"""``int8_conv2d`` passes the operator suite on every kernel."""

from __future__ import annotations

from .suite import ConvSuite


class TestInt8Conv2d(ConvSuite):
    op = "int8_conv2d"
