"""The quantiser: one float tensor in, int8 values and fp32 scales out, bit for bit the same everywhere.

Symmetric int8 with one scale per output channel (weights), per row (linear inputs) or per sample (convolution
inputs); one scale and zero point per tensor for static activations. Every step is one IEEE fp32 operation,
rint goes to even, so any backend that follows the steps gets the same integers.

Integer quantisation: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877. Per-row dynamic scales: Dettmers et al.,
"LLM.int8()", arXiv:2208.07339.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QMAX = 127
QMIN = -128
TINY = 2.0**-100
"""An amax below this counts as zero: its inverse would leave fp32's range."""

MAX_K = 66_311
"""The longest inner product that int32 holds: 255 * 127 * K < 2**31."""

MAX_K_LOWEST = 65_793
"""The longest with weights of -128, which quantising never gives: 255 * 128 * K < 2**31."""


def _scale_and_inverse(amax: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 ``scale = amax / 127`` and ``inv = 127 / amax``; 1 and 0 where amax counts as zero."""
    zero = amax < TINY
    divisor = torch.where(zero, torch.ones_like(amax), amax)
    scale = torch.where(zero, torch.ones_like(amax), divisor / QMAX)
    # Tensor.reciprocal() * 127 would round twice; the contract is one division.
    inverse = torch.where(zero, torch.zeros_like(amax), torch.full_like(amax, QMAX) / divisor)
    return scale, inverse


def _zero_point(zero_point: Tensor | None, like: Tensor) -> Tensor:
    """0-dim fp32: the zero point, 0 where there is none."""
    if zero_point is None:
        return torch.zeros((), dtype=torch.float32, device=like.device)
    return zero_point.to(torch.float32).reshape(())


def _amax(x: Tensor) -> Tensor:
    """fp32 amax of |x| over the last dimension, NaN where a NaN is; 0 where that dimension is empty."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return x.abs().amax(-1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic: one symmetric scale per row.

    Args:
        x: float ``[..., K]``, any float dtype (taken to fp32 first).

    Returns:
        ``q`` int8 of x's shape in [-127, 127] and ``scale`` fp32 ``x.shape[:-1]``. A row whose largest
        magnitude is under 2**-100 has scale 1 and q 0; a row with NaN or Inf has scale NaN and q 0.
    """
    x = x.to(torch.float32)
    amax = _amax(x)
    finite = torch.isfinite(amax)
    scale, inverse = _scale_and_inverse(torch.where(finite, amax, torch.zeros_like(amax)))
    scale = torch.where(finite, scale, torch.full_like(scale, math.nan))
    x = torch.where(finite[..., None], x, torch.zeros_like(x))
    q = torch.clamp(torch.round(x * inverse[..., None]), -QMAX, QMAX)
    return q.to(torch.int8), scale


def quantize_samples(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic: one symmetric scale per sample of ``x`` ``[B, ...]``; ``q`` int8, ``scale`` fp32 ``[B]``."""
    q, scale = quantize_rows(x.reshape(x.shape[0], math.prod(x.shape[1:])))
    return q.reshape(x.shape), scale


def quantize_weight(
    weight: Tensor, scale: Tensor | None = None, *, op: str = "quantize_weight"
) -> tuple[Tensor, Tensor]:
    """One symmetric scale per output channel.

    Args:
        weight: float ``[N, ...]``: ``[N, K]`` or ``[O, I/g, kh, kw]``.
        scale: ``[N]``, positive: rounds to multiples of these rather than of amax / 127, and clips at 127 of
            them.
        op: the name that errors begin with.

    Returns:
        ``q`` int8 of the weight's shape in [-127, 127] and ``scale`` fp32 ``[N]``; an all-zero channel has
        scale 1.

    Raises:
        ValueError: NaN or Inf in the weight, or a scale that is not as above.
    """
    q, found = quantize_samples(weight.detach())
    if bool(torch.isnan(found).any()):
        channel = int(torch.isnan(found).nonzero()[0])
        raise ValueError(
            f"{op}: weight must be finite, got NaN or Inf in output channel {channel}; "
            "repair the checkpoint first"
        )
    if scale is None:
        return q, found
    scale = scale.detach().to(device=weight.device, dtype=torch.float32)
    if scale.shape != found.shape or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{op}: weight_scale must be [{found.numel()}], finite and positive, got "
            f"{list(scale.shape)} from {float(scale.min()) if scale.numel() else math.nan:g} up"
        )
    steps = weight.detach().to(torch.float32) / scale.reshape(-1, *[1] * (weight.dim() - 1))
    return torch.clamp(torch.round(steps), -QMAX, QMAX).to(torch.int8), scale.clone()


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, samples: bool = False
) -> tuple[Tensor, Tensor]:
    """Static: one scale and zero point for the whole tensor.

    Args:
        x: float ``[..., K]``, or ``[B, ...]`` with ``samples=True``.
        scale: fp32, one element, positive.
        zero_point: int32, one element in [-128, 127]; None is 0.
        samples: NaN and Inf spoil their sample ``x[b]`` rather than their row ``x[..., :]``.

    Returns:
        ``q = clamp(rint(x / scale) + zero_point, -128, 127)`` int8 of x's shape (by one multiplication with
        ``1 / scale``) and the row scales fp32 (``[B]`` for samples): ``scale``, or NaN where the row has NaN
        or Inf, whose q are the zero point.
    """
    shape = x.shape
    x = x.to(torch.float32)
    if samples:
        x = x.reshape(shape[0], math.prod(shape[1:]))
    scale = scale.to(torch.float32).reshape(())
    zero = _zero_point(zero_point, x)
    finite = torch.isfinite(_amax(x))
    x = torch.where(finite[..., None], x, torch.zeros_like(x))
    q = torch.clamp(torch.round(x * (torch.ones_like(scale) / scale)) + zero, QMIN, QMAX)
    row_scale = torch.where(finite, scale, torch.full_like(scale, math.nan))
    return q.to(torch.int8).reshape(shape), row_scale


def requantize(y: Tensor, out_scale: Tensor, out_zero_point: Tensor | None = None) -> Tensor:
    """int8 ``clamp(rint(y * (1 / out_scale)) + out_zero_point, -128, 127)``; NaN becomes the zero point."""
    y = y.to(torch.float32)
    scale = out_scale.to(torch.float32).reshape(())
    zero = _zero_point(out_zero_point, y)
    scaled = torch.round(y * (torch.ones_like(scale) / scale))
    scaled = torch.where(torch.isnan(scaled), torch.zeros_like(scaled), scaled)
    return torch.clamp(scaled + zero, QMIN, QMAX).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """fp32 ``(q - zero_point) * scale``; ``scale`` is one element, or one per leading index of ``q``."""
    centred = q.to(torch.int32)
    if zero_point is not None:
        centred = centred - zero_point.to(torch.int32).reshape(())
    scale = scale.to(torch.float32)
    if scale.numel() != 1:
        scale = scale.reshape(-1, *[1] * (q.dim() - 1))
    return centred.to(torch.float32) * scale.reshape(() if scale.numel() == 1 else scale.shape)
