"""The weights that pruning kept, fitted again to what the layer computed before."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this a row has nothing left to fit, and its step would be 0 / 0.
_TINY = 1e-300


def refit(start: Tensor, weight: Tensor, gram: Tensor, mask: Tensor, dampening: float, steps: int) -> Tensor:
    """Kept weights nearer to the least squares fit of the dense layer's outputs.

    Minimises tr((V - W) (X X^T + d I) (V - W)^T) over V with the zeros of `mask`, every row by `steps` of the
    conjugate gradient method, preconditioned by the diagonal, from `start`. Each step lowers it. d draws
    inputs that calibration says little of back to their dense weights. (Boža 2024, "Fast and Effective Weight
    Update for Pruned LLMs", arXiv:2401.02938, fits the same by ADMM.)

    Args:
        start: [G, R, C], zero where the mask is False.
        weight: [G, R, C], the dense one.
        gram: X X^T, [G, C, C].
        mask: [G, R, C] bool, True = kept.
        dampening: d as a share of the mean of the diagonal.

    All float64; returns [G, R, C].
    """
    damped = gram.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    diagonal += dampening * diagonal.mean(1, keepdim=True)
    diagonal.masked_fill_(dead, 1.0)
    scale = diagonal.unsqueeze(1)
    fitted = start.clone()
    residual = ((weight - fitted) @ damped).masked_fill_(~mask, 0.0)
    toward = residual / scale
    direction = toward.clone()
    energy = (residual * toward).sum(2, keepdim=True)
    for _ in range(steps):
        through = (direction @ damped).masked_fill_(~mask, 0.0)
        step = energy / (direction * through).sum(2, keepdim=True).clamp_min(_TINY)
        fitted += step * direction
        residual -= step * through
        toward = residual / scale
        now = (residual * toward).sum(2, keepdim=True)
        direction = toward + now / energy.clamp_min(_TINY) * direction
        energy = now
    return torch.where(mask, fitted, 0.0)
