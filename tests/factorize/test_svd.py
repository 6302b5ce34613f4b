"""Factors against numpy's decomposition and against the optimality they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tautorch.factorize import Svd, tucker2


def product(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    down, up = factors
    return up @ down


def test_svd_is_the_best_approximation(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((2, 9, 6))
    svd = Svd(torch.from_numpy(weight))
    for rank in (1, 3, 6):
        for group in range(2):
            u, s, vh = np.linalg.svd(weight[group], full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            np.testing.assert_allclose(product(svd.factors(rank))[group].numpy(), best, atol=1e-12)
    down, up = svd.factors(4)
    torch.testing.assert_close(down.square().sum(2), up.square().sum(1), rtol=1e-12, atol=0)


def test_rank_of_energy_is_the_least_that_holds_it() -> None:
    svd = Svd(torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0])).unsqueeze(0))
    # Energies 9, 4, 1, 1 of 15.
    assert [svd.rank_of_energy(e) for e in (0.5, 9 / 15, 0.61, 13 / 15, 14 / 15, 1.0)] == [1, 1, 2, 2, 3, 4]
    two = Svd(torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 0.0, 0.0]))]))
    assert two.rank_of_energy(0.9) == 3


def test_whitened_is_the_best_on_the_inputs(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((8, 6))
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    x = rotation * np.array([10, 3, 1, 0.3, 0.2, 0.1]) @ rng.standard_normal((6, 200))
    gram = torch.from_numpy(x @ x.T).unsqueeze(0)
    svd = Svd(torch.from_numpy(weight).unsqueeze(0), gram)
    for rank in (1, 2, 4):
        mine = np.linalg.norm((weight - product(svd.factors(rank))[0].numpy()) @ x)
        # Eckart-Young on the outputs themselves: no weight of this rank can do better.
        s = np.linalg.svd(weight @ x, compute_uv=False)
        assert mine == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-6)
        np.testing.assert_allclose(svd.values[0].numpy(), s[:6], rtol=1e-6)
    np.testing.assert_allclose(product(svd.factors(6))[0].numpy(), weight, atol=1e-9)


def test_whitening_by_a_singular_gram_keeps_what_was_seen(rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((5, 4))).unsqueeze(0)
    x = torch.zeros(4, 10, dtype=torch.float64)
    x[:2] = torch.from_numpy(rng.standard_normal((2, 10)))
    approximated = product(Svd(weight, (x @ x.T).unsqueeze(0)).factors(2))
    assert torch.isfinite(approximated).all()
    torch.testing.assert_close(approximated[0] @ x, weight[0] @ x, atol=1e-6, rtol=0)
    nothing = Svd(weight, torch.zeros(1, 4, 4)).factors(2)
    assert torch.isfinite(product(nothing)).all()


def test_tucker_recovers_a_weight_of_its_ranks(rng: np.random.Generator) -> None:
    core, u_in, u_out = (
        rng.standard_normal((3, 2, 3, 3)),
        rng.standard_normal((6, 2)),
        rng.standard_normal((8, 3)),
    )
    weight = torch.from_numpy(np.einsum("bahw,ia,ob->oihw", core, u_in, u_out))
    a, c, b = tucker2(weight, 2, 3)
    torch.testing.assert_close(torch.einsum("bahw,ia,ob->oihw", c, a, b), weight, atol=1e-10, rtol=0)
    torch.testing.assert_close(a.T @ a, torch.eye(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_tucker_is_no_worse_than_the_truncated_svd_of_each_mode(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((8, 6, 3, 3))
    a, c, b = tucker2(torch.from_numpy(weight), 3, 4)
    error = np.square(weight - torch.einsum("bahw,ia,ob->oihw", c, a, b).numpy()).sum()
    tail = 0.0
    for axis, rank in ((1, 3), (0, 4)):
        s = np.linalg.svd(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1), compute_uv=False)
        tail += (s[rank:] ** 2).sum()
    assert error <= tail
