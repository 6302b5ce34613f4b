"""Losses between policies, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tautorch.distill import GaussianKL, PolicyKL


@pytest.mark.parametrize("temperature", [0.01, 1.0, 5.0])
def test_policy_kl_divides_the_teacher_alone(rng: np.random.Generator, temperature: float) -> None:
    student, values = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)) * 0.05
    q = np.exp((values - values.max(-1, keepdims=True)) / temperature)
    q /= q.sum(-1, keepdims=True)
    log_p = student - np.log(np.exp(student).sum(-1, keepdims=True))
    expected = float((q * (np.log(q) - log_p)).sum(-1).mean())
    found = PolicyKL(temperature)(torch.from_numpy(student), torch.from_numpy(values), None)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_gaussian_kl(rng: np.random.Generator) -> None:
    mean, their_mean = rng.standard_normal((2, 5, 3))
    log_std, their_log_std = rng.standard_normal(3) * 0.3, rng.standard_normal((5, 3)) * 0.3
    s2, t2 = np.exp(2 * log_std), np.exp(2 * their_log_std)
    rows = 0.5 * (np.log(s2 / t2) + (t2 + (their_mean - mean) ** 2) / s2 - 1)
    args = [[torch.from_numpy(a) for a in pair] for pair in ((mean, log_std), (their_mean, their_log_std))]
    found = GaussianKL()(*map(tuple, args), None)
    assert float(found) == pytest.approx(float(rows.sum(-1).mean()), rel=1e-12)
    # The closed form is torch.distributions' too, and equal Gaussians cost nothing.
    first, second = (torch.distributions.Normal(m, s.exp().expand_as(m)) for m, s in args)
    expected = torch.distributions.kl_divergence(second, first).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    assert float(GaussianKL()(tuple(args[0]), tuple(args[0]), None)) == pytest.approx(0.0, abs=1e-14)


def test_the_gradient_reaches_mean_and_spread_of_the_student_alone() -> None:
    tensors = [torch.randn(4, 2, requires_grad=True) for _ in range(4)]
    GaussianKL()((tensors[0], tensors[1]), (tensors[2], tensors[3]), None).backward()
    assert [t.grad is not None for t in tensors] == [True, True, False, False]


def test_bad_input_is_named() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"GaussianKL: the student must give \(mean, log_std\).*got Tensor"):
        GaussianKL()(x, (x, x), None)
    with pytest.raises(ValueError, match=r"teacher's log_std must broadcast .* \[3\] and \[3, 2\]"):
        GaussianKL()((x, x), (x, torch.zeros(3)), None)
    with pytest.raises(ValueError, match=r"means of one shape, got \[3, 2\] and \[3, 4\]"):
        GaussianKL()((x, x), (torch.zeros(3, 4), torch.zeros(3, 4)), None)
    with pytest.raises(ValueError, match="PolicyKL: temperature must be a finite number > 0, got 0"):
        PolicyKL(0)
