"""Gradients that the operators share: of activations, and straight through the quantiser."""

from __future__ import annotations

import torch
from torch import Tensor


def activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """fp32 gradient with respect to the pre-activation."""
    g, z = grad.to(torch.float32), pre
    if activation == "none":
        return g
    if activation == "relu":
        return g * (z > 0)
    if activation == "silu":
        s = torch.sigmoid(z)
        return g * s * (1 + z * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
        return g * (cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327)
    u = 0.7978845608028654 * (z + 0.044715 * z**3)
    t = torch.tanh(u)
    return g * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * z * z))


def inside_range(x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None) -> Tensor | None:
    """Where a static quantiser does not clip (the straight-through gradient passes), or None: everywhere."""
    if x_scale is None:
        return None
    q = torch.round(x.to(torch.float32) * (1.0 / x_scale))
    zp = 0 if x_zero_point is None else x_zero_point
    return (q + zp >= -128) & (q + zp <= 127)


def input_gradient(grad: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None) -> Tensor:
    """fp32 gradient with respect to the quantised x taken to x: zero where a static quantiser clips."""
    inside = inside_range(x, x_scale, x_zero_point)
    return (grad if inside is None else grad * inside).to(x.dtype)
