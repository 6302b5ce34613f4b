"""Numbers as people read them: shared by the terminal, the page and its charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tautorch.compress.report import Check, Proportion


def format_bytes(count: float) -> str:
    """Decimal units: ``88213`` -> ``88.2 kB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def format_seconds(seconds: float) -> str:
    """Three digits: ``1.234e-4`` -> ``123 µs``."""
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def format_accuracy(accuracy: Proportion) -> str:
    """``98.89 % [97.6, 99.5]``."""
    low, high = accuracy.interval()
    return f"{accuracy.value * 100:.2f} % [{low * 100:.1f}, {high * 100:.1f}]"


def batches_of(times: Iterable[Mapping[int, float]]) -> list[int]:
    """Every batch size that occurs, ascending."""
    return sorted({batch for mapping in times for batch in mapping})


def batch_of(shape: str) -> int:
    """The first size of a shape: ``64x1152`` -> 64."""
    return int(shape.partition("x")[0])


def format_share(share: float) -> str:
    """Rounded down, so that only everything is 100 %: ``0.9987`` -> ``99.8 %``."""
    return f"{math.floor(share * 1000 + 1e-9) / 10:g} %"


def format_verdict(check: Check) -> str:
    """One word for how a check came out."""
    if check.passed is None:
        return "not judged"
    if check.kind == "promise":
        return "kept" if check.passed else "BROKEN"
    return "met" if check.passed else "missed"
