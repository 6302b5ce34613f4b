"""Ranks that stand out of noise: the planted ones are found, against numpy's own free energy too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tautorch.factorize import FactorizedLinear, TuckerConv2d, factorize
from tautorch.factorize.vbmf import vbmf_rank


def planted(rows: int, columns: int, rank: int, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))[0]
    signal = u @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64)) @ v.T
    return signal + noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (40, 160), (160, 40)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_planted_ranks_are_found(rows: int, columns: int, rank: int) -> None:
    assert vbmf_rank(planted(rows, columns, rank, 0.01, rank)) == rank


def test_the_noise_minimises_the_free_energy_by_hand() -> None:
    """One value at a time, over a fine grid of variances; the count above the threshold is the rank."""
    matrix = planted(30, 50, 6, 0.1, 7)
    s = np.linalg.svd(matrix.numpy(), compute_uv=False)
    alpha = 30 / 50
    tau_edge = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau_edge) * (1 + alpha / tau_edge)

    def energy(noise: float) -> float:
        total = 0.0
        for value in s:
            x = value**2 / (50 * noise)
            total += x - math.log(x)
            if x > edge:
                tau = (x - (1 + alpha) + math.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha)) / 2
                total += math.log(tau + 1) + alpha * math.log(tau / alpha + 1) - tau
        return total

    skipped = min(math.ceil(30 / (1 + alpha)) - 1, 29)
    low = max(s[skipped] ** 2 / (50 * edge), float((s[skipped:] ** 2).mean()) / 50)
    variances = np.linspace(low, float((s**2).sum()) / (30 * 50), 20_000)
    best = min(variances, key=energy)
    assert 0.006 < best < 0.014  # the noise has 0.01
    assert vbmf_rank(matrix) == int((s**2 > 50 * best * edge).sum())


def test_edges() -> None:
    assert vbmf_rank(torch.zeros(4, 6)) == 1
    assert vbmf_rank(torch.randn(50, 80, generator=torch.Generator().manual_seed(0))) <= 2
    assert vbmf_rank(torch.ones(1, 9)) == 1
    assert vbmf_rank(planted(20, 30, 3, 0.0, 1)) == 3


def test_layers_by_vbmf() -> None:
    model = nn.Sequential(nn.Linear(60, 40))
    with torch.no_grad():
        model[0].weight.copy_(planted(40, 60, 4, 0.005, 2))
    done = factorize(model, rank="vbmf")
    assert isinstance(done[0], FactorizedLinear) and done[0].rank == 4
    conv = nn.Sequential(nn.Conv2d(24, 32, 3))
    generator = torch.Generator().manual_seed(3)
    core = torch.randn(5, 3, 3, 3, generator=generator)
    u_out, u_in = torch.randn(32, 5, generator=generator), torch.randn(24, 3, generator=generator)
    with torch.no_grad():
        conv[0].weight.copy_(torch.einsum("ob,bahw,ia->oihw", u_out, core, u_in))
        conv[0].weight.add_(0.05 * torch.randn(32, 24, 3, 3, generator=generator))
    found = factorize(conv, "tucker", rank="vbmf")
    assert isinstance(found[0], TuckerConv2d) and found[0].ranks == (3, 5)


def test_not_for_whitened_weights() -> None:
    with pytest.raises(ValueError, match='rank "vbmf" looks for noise in the weight itself'):
        factorize(nn.Sequential(nn.Linear(8, 8)), "whitened", rank="vbmf", calibration=[torch.randn(9, 8)])
