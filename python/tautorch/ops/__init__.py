"""Functional forms of the operators. Tensors in, tensors out; see each function."""

from __future__ import annotations

from .int8_linear import int8_linear

__all__ = ["int8_linear"]
