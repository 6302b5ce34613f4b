"""Scales and zero points, by the package's quantiser: fp32 scales, rint to even, ranges that hold zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a range counts as zero, as in the kernels.
_TINY = 2.0**-100
# Fractions of the largest weight that the scale search tries.
_SHRINK = [1.0 - 0.01 * step for step in range(51)]


@dataclass(frozen=True)
class QParams:
    """Static quantisation of one tensor: q = clamp(rint(x / scale) + zero_point, -128, 127).

    `scale` is exactly representable in float32, `zero_point` is in [-128, 127]; 0 stands for 0.0 exactly.
    """

    scale: float
    zero_point: int

    def quantize(self, x: Tensor) -> Tensor:
        """int8 of finite x; multiplied by 1 / scale, one fp32 division, as in the kernels."""
        inverse = torch.ones((), device=x.device) / torch.tensor(self.scale, device=x.device)
        q = torch.round(x.float() * inverse) + self.zero_point
        return q.clamp(-128, 127).to(torch.int8)

    def dequantize(self, q: Tensor) -> Tensor:
        """float32 of int8 q."""
        return (q.to(torch.int32) - self.zero_point).float() * torch.tensor(self.scale, device=q.device)


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


def quantize_weight(weight: Tensor, per_channel: bool = True, search: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise a weight to int8 in [-127, 127], symmetric.

    Args:
        weight: [O, ...], floating point, finite.
        per_channel: one scale for each output (dim 0), or one for all.
        search: take the scale with the least sum (Q(w) - w)^2 among 51 that clip up to half the range, in
            place of amax / 127 (Nagel et al. 2021, arXiv:2106.08295, section 3.1).

    Returns (q int8 of the weight's shape, scale float32 [O] or [1]). Channels whose largest magnitude is
    below 2^-100 get scale 1 and zeros. Raises TypeError/ValueError for a weight that is not as above.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"quantize_weight: weight must be a floating point tensor, got {kind}")
    if weight.dim() < 1 or weight.numel() == 0:
        raise ValueError(f"quantize_weight: weight must be a full [O, ...], got {list(weight.shape)}")
    rows = weight.detach().float().reshape(weight.shape[0] if per_channel else 1, -1)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("quantize_weight: weight must be finite in float32, got NaN or Inf")
    amax = rows.abs().amax(dim=1)
    empty = amax < _TINY
    amax = torch.where(empty, torch.full_like(amax, 127.0), amax)
    best_q, best_scale = _rounded(rows, amax, empty)
    if search:
        error = _squared_error(rows, best_q, best_scale)
        for shrink in _SHRINK[1:]:
            q, scale = _rounded(rows, amax * shrink, empty)
            trial = _squared_error(rows, q, scale)
            better = (trial < error) & ~empty
            error = torch.where(better, trial, error)
            best_scale = torch.where(better, scale, best_scale)
            best_q = torch.where(better.unsqueeze(1), q, best_q)
    return best_q.to(torch.int8).reshape(weight.shape), best_scale


def _rounded(rows: Tensor, top: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.round(rows * (127.0 / top).unsqueeze(1)).clamp_(-127, 127)
    return q.masked_fill_(empty.unsqueeze(1), 0.0), top / 127.0


def _squared_error(rows: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return (q.double() * scale.double().unsqueeze(1) - rows.double()).square().sum(1)


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
