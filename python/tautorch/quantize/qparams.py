"""Scales and zero points, by the package's quantiser: fp32 scales, rint to even, ranges that hold zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tautorch.quantize.steps import least_squares_steps

# Below this a range counts as zero, as in the kernels.
_TINY = 2.0**-100


@dataclass(frozen=True)
class QParams:
    """Static quantisation of one tensor: q = clamp(rint(x / scale) + zero_point, -128, 127).

    `scale` is exactly representable in float32, `zero_point` is in [-128, 127]; 0 stands for 0.0 exactly.
    """

    scale: float
    zero_point: int

    def quantize(self, x: Tensor) -> Tensor:
        """int8 of finite x; multiplied by 1 / scale, one fp32 division, as in the kernels."""
        scale = torch.tensor(self.scale, dtype=torch.float32, device=x.device)
        q = torch.round(x.float() * (torch.ones_like(scale) / scale)) + self.zero_point
        return q.clamp(-128, 127).to(torch.int8)

    def dequantize(self, q: Tensor) -> Tensor:
        """float32 of int8 q."""
        scale = torch.tensor(self.scale, dtype=torch.float32, device=q.device)
        return (q.to(torch.int32) - self.zero_point).float() * scale


def check_bits(op: str, bits: int, least: int = 4) -> int:
    """`bits`, if it is a whole number from `least` to 8; ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= 8:
        raise ValueError(f"{op}: bits must be a whole number from {least} to 8, got {bits!r}")
    return bits


def qparams_of_range(low: float, high: float, symmetric: bool = False) -> QParams:
    """The parameters that cover [low, high] and 0.

    Asymmetric: 255 steps from the lower to the upper end. Symmetric: zero point 0, 127 steps to the farther
    end. A range below 2^-100 gives scale 1. Raises ValueError for a range that is not finite or reversed.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"qparams_of_range: low <= high must be finite, got {low} and {high}")
    low, high = min(low, 0.0), max(high, 0.0)
    if max(-low, high) < _TINY:
        return QParams(1.0, 0)
    if symmetric:
        return QParams(_fp32(max(-low, high) / 127), 0)
    scale = _fp32((high - low) / 255)
    zero_point = round(-128 - low / scale)
    return QParams(scale, min(max(zero_point, -128), 127))


def quantize_weight(
    weight: Tensor,
    per_channel: bool = True,
    search: bool = False,
    bits: int = 8,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise a weight to int8 holding integers of `bits` bits, symmetric: [-127, 127] at 8, [-7, 7] at 4.

    Args:
        weight: [O, ...], floating point, finite.
        per_channel: one scale for each output (dim 0), or one for all.
        search: take the scale with the least sum of h (Q(w) - w)^2 (see `least_squares_steps`) in place of
            amax / 127 (Nagel et al. 2021, arXiv:2106.08295, section 3.1).
        bits: 2 to 8.
        importance: h of the search, non-negative, of the weight's shape or one for each input (dims 1 on),
            such as the mean square of the inputs; None is 1.

    Returns (q int8 of the weight's shape, scale float32 [O] or [1]). Channels whose largest magnitude is
    below 2^-100 get scale 1 and zeros. Raises TypeError/ValueError for arguments that are not as above.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"quantize_weight: weight must be a floating point tensor, got {kind}")
    if weight.dim() < 1 or weight.numel() == 0:
        raise ValueError(f"quantize_weight: weight must be a full [O, ...], got {list(weight.shape)}")
    top = 2 ** (check_bits("quantize_weight", bits, least=2) - 1) - 1
    rows = weight.detach().float().reshape(weight.shape[0] if per_channel else 1, -1)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("quantize_weight: weight must be finite in float32, got NaN or Inf")
    if importance is not None:
        importance = _checked_importance(importance, weight, search).reshape(rows.shape)
    amax = rows.abs().amax(dim=1)
    empty = amax < _TINY
    amax = torch.where(empty, torch.full_like(amax, top), amax)
    if search:
        found = least_squares_steps(rows, top, importance).float()
        scale = torch.where(empty | (found < _TINY), amax / top, found)
        q = torch.round(rows / scale.unsqueeze(1)).clamp_(-top, top)
    else:
        scale = amax / top
        q = torch.round(rows * (top / amax).unsqueeze(1)).clamp_(-top, top)
    q.masked_fill_(empty.unsqueeze(1), 0.0)
    return q.to(torch.int8).reshape(weight.shape), scale


def _checked_importance(importance: Tensor, weight: Tensor, search: bool) -> Tensor:
    """float64, of the weight's shape."""
    fits = importance.shape in (weight.shape, weight.shape[1:])
    if not search or not fits or not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError(
            f"quantize_weight: importance must be finite, not negative, {list(weight.shape)} or "
            f"{list(weight.shape[1:])}, with search=True, got {list(importance.shape)}"
        )
    return importance.detach().to(weight.device, torch.float64).expand(weight.shape)


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
