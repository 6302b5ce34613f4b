"""What `load` of a peer returns for each variant, and the numbers all peers quantise by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Loaded:
    """One way of running the case: `call` runs it once, `output` gives what the last call computed."""

    call: Callable[[], object]
    output: Callable[[], Any]
    kernel: str = ""


@dataclass(frozen=True)
class Range:
    """Static quantisation of activations to uint8: real = scale (q - zero_point)."""

    low: float
    high: float

    @property
    def scale(self) -> np.float32:
        return np.float32((self.high - self.low) / 255)

    @property
    def zero_point(self) -> np.uint8:
        return np.uint8(round(-self.low / float(self.scale)))


def range_of(x: Any) -> Range:
    """The range that calibration by minimum and maximum finds, widened so that zero is exact."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = max(high - low, 1e-6) / 255
    low = -round(-low / step) * step
    return Range(low, low + 255 * step)


def quantize_weight(weight: Any) -> tuple[Any, Any]:
    """int8 in [-127, 127] and one float32 scale per output (first dimension), symmetric."""
    flat = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = (np.where(flat == 0, 1, flat) / 127).astype(np.float32)
    q = np.rint(weight / scale.reshape(-1, *([1] * (weight.ndim - 1))))
    return np.clip(q, -127, 127).astype(np.int8), scale


def arrays(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """x, weight and bias of a case."""
    return tuple(np.load(case[name]) for name in ("x", "weight", "bias"))  # type: ignore[return-value]
