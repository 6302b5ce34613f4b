"""Layers that replace ``nn.Linear`` and ``nn.Conv2d``."""

from __future__ import annotations

from .int8_conv2d import Int8Conv2d
from .int8_linear import Int8Linear
from .lowrank_conv2d import LowRankConv2d
from .lowrank_linear import LowRankLinear
from .packed import PackedModule
from .sparse_conv2d import SparseConv2d
from .sparse_linear import SparseLinear

MODULES: dict[str, type[PackedModule]] = {
    c.__name__: c
    for c in (
        Int8Linear,
        SparseLinear,
        LowRankLinear,
        Int8Conv2d,
        SparseConv2d,
        LowRankConv2d,
    )
}

__all__ = [
    "MODULES",
    "Int8Conv2d",
    "Int8Linear",
    "LowRankConv2d",
    "LowRankLinear",
    "PackedModule",
    "SparseConv2d",
    "SparseLinear",
]
