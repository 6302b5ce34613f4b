"""Relations between the samples of a batch, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.distill import Relation, SoftTarget

Array = np.ndarray[Any, np.dtype[np.float64]]


def huber(a: Any) -> Any:
    return np.where(np.abs(a) <= 1, a**2 / 2, np.abs(a) - 0.5)


def distance(a: Array, b: Array) -> float:
    found = []
    for x in (a, b):
        d = np.array([[np.linalg.norm(u - v) for v in x] for u in x])
        found.append(d / d[d > 0].mean())
    pairs = ~np.eye(len(a), dtype=bool)
    return float(huber(found[0] - found[1])[pairs].mean())


def angle(a: Array, b: Array) -> float:
    def cosine(x: Array, i: int, j: int, k: int) -> float:
        u, v = x[i] - x[j], x[k] - x[j]
        return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v))) if i != j and k != j else 0.0

    n = range(len(a))
    return float(np.mean([huber(cosine(a, i, j, k) - cosine(b, i, j, k)) for i in n for j in n for k in n]))


def similarity(a: Array, b: Array) -> float:
    g = [x @ x.T for x in (a, b)]
    g = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in g]
    return float(((g[0] - g[1]) ** 2).sum() / len(a) ** 2)


@pytest.mark.parametrize("by_hand", [distance, angle, similarity])
def test_values(rng: np.random.Generator, by_hand: Callable[[Array, Array], float]) -> None:
    student, teacher = rng.standard_normal((6, 3)), rng.standard_normal((6, 2, 4)) * 5
    loss = Relation(by_hand.__name__, weight=2.0)  # type: ignore[arg-type]
    found = loss(torch.from_numpy(student), torch.from_numpy(teacher), None)
    assert float(found) == pytest.approx(2.0 * by_hand(student, teacher.reshape(6, -1)), rel=1e-10)
    turned = student @ np.linalg.qr(rng.standard_normal((3, 3)))[0] * 3.0
    same = Relation(by_hand.__name__)(torch.from_numpy(turned), torch.from_numpy(student), None)  # type: ignore[arg-type]
    assert float(same) == pytest.approx(0.0, abs=1e-12), "turning and scaling changes no relation"


@pytest.mark.parametrize("kind", ["distance", "angle", "similarity"])
def test_equal_samples_have_gradients_like_the_others(kind: Any) -> None:
    student = torch.randn(5, 3)
    student[3] = student[1]
    student.requires_grad_()
    Relation(kind)(student, torch.randn(5, 4), None).backward()
    assert student.grad is not None
    assert 0 < float(student.grad.abs().max()) < 10


def test_of_layers_with_a_base() -> None:
    teacher, student = (nn.Sequential(nn.Linear(3, n), nn.Linear(n, 4)) for n in (7, 5))
    loss = Relation("similarity", student_layer="0", teacher_layer="0", base=SoftTarget(1.0, 0.0))
    x = torch.randn(6, 3)
    with loss.attached(teacher, student):
        s, t = student(x), teacher(x)
        found = loss(s, t, None)
    expected = Relation("similarity")(student[0](x), teacher[0](x), None) + SoftTarget(1.0, 0.0)(s, t, None)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert teacher[0].weight.grad is None
    assert student[0].weight.grad is not None


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="kind must be one of distance, angle, similarity"):
        Relation("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be given together, got 'a' and None"):
        Relation(student_layer="a")
    with pytest.raises(ValueError, match="at least 3 samples, the same for both, got 2"):
        Relation("angle")(x[:2], x[:2], None)
    with pytest.raises(ValueError, match="got 4 from the student and 3 from the teacher"):
        Relation()(x, x[:3], None)
    with pytest.raises(TypeError, match=r"teacher's feature must be a float tensor \[B, ...\], got NoneType"):
        Relation()(x, None, None)
