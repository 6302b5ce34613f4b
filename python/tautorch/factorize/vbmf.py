"""How many singular values of a weight stand out of noise, by empirical variational Bayes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GRID = 256  # noise levels looked at in each of two passes


def vbmf_rank(matrix: Tensor) -> int:
    """The rank of a matrix [L, M] under the noise that explains the rest of it, at least 1.

    The global analytic solution of empirical variational Bayesian matrix factorisation (Nakajima et al. 2013,
    JMLR 14), by which Kim et al. 2016 (arXiv:1511.06530) choose the ranks of Tucker-2: the noise variance
    minimises the free energy, equation by equation in closed form, and what is below its threshold is noise.
    """
    shape = sorted(matrix.shape)
    short, long = shape[0], shape[1]
    squares = torch.linalg.svdvals(matrix.detach().double()).square() / long
    total = float(squares.sum())
    if total == 0:
        return 1
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    rest = squares[min(math.ceil(short / (1 + alpha)) - 1, short - 1) :]
    high = total / short
    low = max(float(rest[0]) / edge, float(rest.mean()), high * 1e-12)
    if low < high:
        spread = torch.logspace(math.log10(low), math.log10(high), _GRID, dtype=torch.float64)
        best = int(_free_energy(squares, spread, alpha, edge).argmin())
        ends = float(spread[max(best - 1, 0)]), float(spread[min(best + 1, _GRID - 1)])
        spread = torch.linspace(*ends, _GRID, dtype=torch.float64)
        low = float(spread[_free_energy(squares, spread, alpha, edge).argmin()])
    return max(1, int((squares > low * edge).sum()))


def _free_energy(squares: Tensor, noise: Tensor, alpha: float, edge: float) -> Tensor:
    """The free energy of each noise variance [N], up to constants; `squares` [L] are s^2 / M."""
    x = squares.cpu().clamp_min(1e-300) / noise.unsqueeze(1)
    above = (x - (1 + alpha)).clamp_min(2 * math.sqrt(alpha))
    tau = (above + (above.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
    kept = torch.log(tau + 1) + alpha * torch.log(tau / alpha + 1) - tau
    return (x - x.log() + torch.where(x > edge, kept, torch.zeros_like(kept))).sum(1)
