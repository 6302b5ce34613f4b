"""The step of a grid that rounds a weight with the least squared error, found exactly."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that a sweep sorts at once: 32 MiB of float64 for each of its arrays.
_SWEEP = 4 << 20
# Up to so many weights times levels are swept in full, which sorts them; more are searched by fractions of
# amax first and swept around the best.
_FULL_SWEEP = 16 << 20
_FRACTIONS = 100


def least_squares_steps(rows: Tensor, top: int, importance: Tensor | None = None) -> Tensor:
    """For each row w the step s > 0 with the least sum of h (s clamp(rint(w / s), -top, top) - w)^2.

    While no w_i / s crosses a half, the integers q stay and the error is a parabola in s with its minimum
    sum(h w^2) - A^2 / B, A = sum(h |w| q), B = sum(h q^2), at s = A / B. Rounding at that s can only be
    better than q, so the best s is the A / B of the interval with the largest A^2 / B: all intervals are
    walked through, largest s first, in sorted order of their ends |w_i| / (k - 1/2). Exact up to
    2^24 weights times `top`; above, 100 fractions of amax / top are tried and the walk goes around the best.

    Args:
        rows: finite [O, K], any floating dtype.
        top: the largest integer.
        importance: h, non-negative, [K] or [O, K]; None is 1.

    Returns float64 [O]; 1 for rows without a weight that counts.
    """
    a = rows.detach().double().abs()
    h = torch.ones_like(a) if importance is None else importance.to(a).expand_as(a)
    a = torch.where(h > 0, a, torch.zeros_like(a))
    found = torch.ones(a.shape[0], dtype=torch.float64, device=a.device)
    amax = a.amax(dim=1) if a.shape[1] else a.new_zeros(a.shape[0])
    alive = (amax > 0).nonzero().flatten()
    full = a.numel() * top <= _FULL_SWEEP
    levels = top if full else 2 + 2 * top // _FRACTIONS
    chunk = max(1, _SWEEP // max(1, a.shape[1] * levels))
    for part in torch.split(alive, chunk):
        found[part] = _steps(a[part], h[part], amax[part], top, full)
    return found


def _steps(a: Tensor, h: Tensor, amax: Tensor, top: int, full: bool) -> Tensor:
    if full:
        return _sweep(a, h, torch.full_like(amax, torch.inf), torch.zeros_like(amax), top)
    best, error = torch.ones_like(amax), torch.full_like(amax, torch.inf)
    for number in range(1, _FRACTIONS + 1):
        fraction = number / _FRACTIONS
        s = (amax * (fraction / top)).unsqueeze(1)
        trial = (h * ((a / s).round().clamp(max=top) * s - a).square()).sum(1)
        better = trial < error
        error = torch.where(better, trial, error)
        best = torch.where(better, torch.full_like(best, fraction), best)
    unit = amax / top
    low = unit * (best - 1 / _FRACTIONS).clamp(min=0.5 / _FRACTIONS)
    return _sweep(a, h, unit * (best + 1 / _FRACTIONS), low, top)


def _sweep(a: Tensor, h: Tensor, high: Tensor, low: Tensor, top: int) -> Tensor:
    """The best A / B of the intervals between `low` and `high` [O]."""
    start = (a / high.unsqueeze(1)).round().clamp(max=top)
    end = (a / low.unsqueeze(1)).nan_to_num(0.0).round().clamp(max=top)  # 0 / 0: a zero stays 0
    count = int((end - start).max())
    k = start.unsqueeze(2) + torch.arange(1, count + 1, dtype=a.dtype, device=a.device)
    inside = (k <= end.unsqueeze(2)).flatten(1)
    place = torch.where(inside, (a.unsqueeze(2) / (k - 0.5)).flatten(1), 0.0)
    order = place.argsort(dim=1, descending=True)
    step_a = torch.where(inside, (h * a).unsqueeze(2).expand_as(k).flatten(1), 0.0)
    step_b = torch.where(inside, (h.unsqueeze(2) * (2 * k - 1)).flatten(1), 0.0)
    first_a, first_b = (h * a * start).sum(1, keepdim=True), (h * start.square()).sum(1, keepdim=True)
    sum_a = torch.cat([first_a, first_a + step_a.gather(1, order).cumsum(1)], 1)
    sum_b = torch.cat([first_b, first_b + step_b.gather(1, order).cumsum(1)], 1)
    gain = torch.where(sum_b > 0, sum_a.square() / sum_b.clamp(min=1e-300), 0.0)
    best = gain.argmax(dim=1, keepdim=True)
    return (sum_a.gather(1, best) / sum_b.gather(1, best)).squeeze(1)
