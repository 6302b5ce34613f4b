"""The factor of the inverse Gram matrix, against numpy's inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tautorch._gram import inverse_factor


def test_the_factor_multiplies_to_the_inverse(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 7, 40))
    gram = x @ x.transpose(0, 2, 1)
    factor, dead = inverse_factor("test", "fc", torch.from_numpy(gram), 0.05)
    assert not dead.any()
    for group in range(2):
        damped = gram[group] + 0.05 * np.diag(gram[group]).mean() * np.eye(7)
        upper = factor[group].numpy()
        np.testing.assert_array_equal(upper, np.triu(upper))
        np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped), rtol=1e-9, atol=1e-14)


def test_inputs_that_never_moved_are_dead_and_stand_apart(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 30))
    x[2] = 0
    factor, dead = inverse_factor("test", "fc", torch.from_numpy(x @ x.T).unsqueeze(0))
    assert dead.tolist() == [[False, False, True, False]]
    unit = np.eye(4)[2]
    np.testing.assert_array_equal(factor[0, 2].numpy(), unit)
    np.testing.assert_array_equal(factor[0, :, 2].numpy(), unit)


def test_fewer_rows_than_inputs_are_enough_with_dampening(rng: np.random.Generator) -> None:
    x = rng.standard_normal((16, 3))
    factor, _ = inverse_factor("test", "fc", torch.from_numpy(x @ x.T).unsqueeze(0))
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("dampening", [0, -0.1, float("nan"), float("inf"), True, "1"])
def test_dampening_out_of_range_is_refused(dampening: object) -> None:
    with pytest.raises(ValueError, match="test: dampening must be a positive number"):
        inverse_factor("test", "fc", torch.eye(2).unsqueeze(0).double(), dampening)  # type: ignore[arg-type]


def test_a_matrix_that_is_no_gram_is_refused() -> None:
    bad = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]], dtype=torch.float64)
    with pytest.raises(ValueError, match="layer 'fc' must have a positive definite Gram"):
        inverse_factor("test", "fc", bad)
