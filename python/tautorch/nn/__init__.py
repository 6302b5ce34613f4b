"""Layers that replace ``nn.Linear`` and ``nn.Conv2d``."""

from __future__ import annotations

from .int8_linear import Int8Linear
from .packed import PackedModule

MODULES: dict[str, type[PackedModule]] = {c.__name__: c for c in (Int8Linear,)}

__all__ = ["MODULES", "Int8Linear", "PackedModule"]
