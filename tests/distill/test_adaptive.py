"""Per-sample and learned weights, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.distill import (
    Adaptive,
    Distiller,
    FeatureHint,
    HardLabel,
    LogVariances,
    SoftTarget,
    Uncertainty,
)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("trust", ["target", "correct", "confidence", "entropy"])
def test_values(rng: np.random.Generator, trust: Any) -> None:
    student, teacher = rng.standard_normal((8, 5)) * 2, rng.standard_normal((8, 5)) * 2
    target = rng.integers(0, 5, 8)
    target[:3] = teacher[:3].argmax(-1)
    target[6] = -100
    kept, t = target >= 0, 3.0
    p = softmax(teacher)
    w = {
        "target": p[np.arange(8), np.where(kept, target, 0)],
        "correct": (teacher.argmax(-1) == target).astype(float),
        "confidence": p.max(-1),
        "entropy": 1 + (p * np.log(p)).sum(-1) / np.log(5),
    }[trust]
    q, soft = softmax(teacher / t), softmax(student / t)
    kl = t**2 * (q * np.log(q / soft)).sum(-1)
    hard = -np.log(softmax(student)[np.arange(8), np.where(kept, target, 0)])
    expected = float((w * kl + (1 - w) * hard)[kept].mean())
    found = Adaptive(trust, temperature=t)(*map(torch.from_numpy, (student, teacher, target)))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_entropy_of_a_sure_teacher_is_no_nan() -> None:
    teacher = torch.tensor([[200.0, -200.0, -200.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    loss = Adaptive("entropy", temperature=1.0)(student, teacher, torch.tensor([1]))
    assert loss.item() == pytest.approx(np.log(3))
    loss.backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_the_mistakes_of_the_teacher_are_not_passed_on() -> None:
    teacher, target = torch.tensor([[9.0, 0.0]]), torch.tensor([1])
    student = torch.zeros(1, 2, requires_grad=True)
    Adaptive("correct")(student, teacher, target).backward()
    assert student.grad is not None
    assert student.grad[0, 1] < 0 < student.grad[0, 0]


def test_uncertainty_is_kendalls_and_learns_its_weights() -> None:
    torch.manual_seed(0)
    s, t, y = torch.randn(6, 4), torch.randn(6, 4), torch.randint(0, 4, (6,))
    parts = [SoftTarget(4.0, 0.0), HardLabel(1.0)]
    loss = Uncertainty(*parts)
    terms = [float(part(s, t, y)) for part in parts]
    assert float(loss(s, t, y).detach()) == pytest.approx(sum(terms))
    with torch.no_grad():
        loss.weigh.log_variances.copy_(torch.tensor([0.7, -0.4]))
    expected = np.exp(-0.7) * terms[0] + 0.35 + np.exp(0.4) * terms[1] - 0.2
    assert float(loss(s, t, y).detach()) == pytest.approx(expected, rel=1e-6)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(s, t, y)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    best = torch.exp(-loss.weigh.log_variances).tolist()
    assert best == pytest.approx([1 / (2 * term) for term in terms], rel=1e-2)


def test_a_distiller_wants_and_trains_the_variances() -> None:
    teacher, student = nn.Linear(4, 3).eval(), nn.Linear(4, 3)
    loss = Uncertainty(SoftTarget(alpha=0.0), FeatureHint("0", "0"))
    teacher, student = nn.Sequential(teacher).eval(), nn.Sequential(student)
    with pytest.raises(ValueError, match=r"hold the loss's own parameters, got no weigh.log_variances"):
        Distiller(teacher, student, loss, torch.optim.SGD(student.parameters(), 0.1))
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], 0.05)
    Distiller(teacher, student, loss, optimizer, progress=False).fit([(torch.randn(8, 4), None)], 5)
    assert bool((loss.weigh.log_variances != 0).all())


def test_bad_input_is_named() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="trust must be one of target, correct, confidence, entropy"):
        Adaptive("teacher")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Adaptive: target must be a tensor, got NoneType"):
        Adaptive()(x, x, None)
    with pytest.raises(ValueError, match=r"target must be int64 classes, got torch.float32 probabilities"):
        Adaptive()(x, x, x)
    with pytest.raises(ValueError, match="LogVariances: terms must be an int >= 1, got 0"):
        LogVariances(0)
    with pytest.raises(ValueError, match="Uncertainty: losses must be two or more callables"):
        Uncertainty(SoftTarget())
