"""Functional forms of the operators. Tensors in, tensors out; see each function."""

from __future__ import annotations

from .int8_conv2d import int8_conv2d
from .int8_linear import int8_linear
from .lowrank_conv2d import lowrank_conv2d
from .lowrank_linear import lowrank_linear
from .quantize_rows import quantize_rows
from .sparse_conv2d import sparse_conv2d
from .sparse_linear import sparse_linear

__all__ = [
    "int8_conv2d",
    "int8_linear",
    "lowrank_conv2d",
    "lowrank_linear",
    "quantize_rows",
    "sparse_conv2d",
    "sparse_linear",
]
