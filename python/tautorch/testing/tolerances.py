"""One table of float tolerances, computed from the epsilon of the output's dtype.

Integers are compared exactly and appear nowhere here. A float result may differ from the reference by

    eps(out) * |expected|  +  ROUNDINGS[kind] * eps(float32) * magnitude

where ``magnitude`` is the size of the terms that were added up (not of their sum: terms cancel).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS: dict[torch.dtype, float] = {
    dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)
}

ROUNDINGS: dict[str, float] = {
    # exact accumulator, then two scales and a bias: at most 4 roundings, less whether they are fused or not
    "integer": 4.0,
    # the same through gelu or silu: a polynomial or a library's exp and erf add a few units
    "activation": 16.0,
}
"""fp32 roundings between the exact accumulator and the output."""


def roundings(kind: str, k: int = 1) -> float:
    """Roundings of a product of ``kind``; "float" adds ``k`` terms over at least 8 accumulators."""
    if kind == "float":
        return ROUNDINGS["activation"] + k / 8
    return ROUNDINGS[kind]


def bound(expected: Tensor, magnitude: Tensor | float, kind: str, k: int = 1) -> Tensor:
    """Largest allowed ``|actual - expected|`` in float64, elementwise."""
    info = torch.finfo(expected.dtype)
    wide = expected.double().abs().nan_to_num(0.0, 0.0, 0.0)
    size = torch.as_tensor(magnitude, dtype=torch.float64).abs().nan_to_num(0.0, 0.0, 0.0)
    # below the normal range the spacing is absolute
    return info.eps * (wide + info.smallest_normal) + roundings(kind, k) * EPS[torch.float32] * size


def assert_close(
    actual: Tensor, expected: Tensor, *, magnitude: Tensor | float, kind: str = "integer", k: int = 1
) -> None:
    """AssertionError, naming the worst, unless dtype, shape, NaN and Inf agree and the rest is near."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    if not actual.dtype.is_floating_point:
        if not torch.equal(actual, expected):
            at = tuple(int(i) for i in (actual != expected).nonzero()[0])
            raise AssertionError(f"integers differ, first at {at}: got {actual[at]}, expected {expected[at]}")
        return
    special = ~torch.isfinite(expected) | ~torch.isfinite(actual)
    same = (actual == expected) | (torch.isnan(actual) & torch.isnan(expected))
    if bool((special & ~same).any()):
        at = tuple(int(i) for i in (special & ~same).nonzero()[0])
        raise AssertionError(f"NaN or Inf differ, first at {at}: got {actual[at]}, expected {expected[at]}")
    error = (actual.double() - expected.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    over = error - bound(expected, magnitude, kind, k)
    if bool((over > 0).any()):
        at = tuple(int(i) for i in (over == over.max()).nonzero()[0])
        raise AssertionError(
            f"{int((over > 0).sum())} of {over.numel()} elements off, worst at {at}: got "
            f"{float(actual[at])!r}, expected {float(expected[at])!r}, off by {float(error[at]):.3g}, "
            f"allowed {float((error - over)[at]):.3g}"
        )
