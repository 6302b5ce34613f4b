"""Regression targets by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tautorch.distill import Regression


def huber(r: np.ndarray, delta: float) -> float:
    a = np.abs(r)
    return float(np.where(a <= delta, a**2 / 2, delta * (a - delta / 2)).mean())


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("delta", [None, 0.4, 2.0])
def test_values(rng: np.random.Generator, alpha: float, delta: float | None) -> None:
    student, teacher, target = (rng.standard_normal((5, 3)) * 2 for _ in range(3))
    loss = Regression(alpha) if delta is None else Regression(alpha, distance="huber", delta=delta)

    def distance(r: np.ndarray) -> float:
        return float((r**2).mean()) if delta is None else huber(r, delta)

    expected = alpha * distance(student - target) + (1 - alpha) * distance(student - teacher)
    found = loss(*map(torch.from_numpy, (student, teacher, target)))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_no_gradient_reaches_the_teacher_and_half_is_computed_in_single() -> None:
    student, teacher = (torch.randn(4, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    loss = Regression()(student, teacher, None)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert teacher.grad is None


def test_bad_input_is_named() -> None:
    x = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"the teacher's output must be \[4, 1\] .*, got \[4\]"):
        Regression()(x, torch.zeros(4), None)
    with pytest.raises(TypeError, match="the target must be a floating point tensor, got NoneType"):
        Regression(0.5)(x, x, None)
    with pytest.raises(TypeError, match=r"student's output must be a floating point tensor, got torch.int64"):
        Regression()(x.long(), x, None)
    with pytest.raises(ValueError, match="at least one value"):
        Regression()(x[:0], x[:0], None)
    with pytest.raises(ValueError, match='distance must be "mse" or "huber"'):
        Regression(distance="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="delta must be a finite number > 0"):
        Regression(distance="huber", delta=0)
