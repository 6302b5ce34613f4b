"""Sequences: shift, padding, and losses of one's choice at every position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.distill import Adaptive, FeatureHint, HardLabel, SoftTarget, TokenLevel


def by_hand(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, pad: int, alpha: float, t: float
) -> float:
    """Position l of sequence b predicts token l + 1, unless that is padding."""
    terms = []
    for b in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            label = labels[b, position + 1]
            if label == pad:
                continue
            z, w = student[b, position], teacher[b, position]
            p, q = (np.exp(v / t) / np.exp(v / t).sum() for v in (z, w))
            hard = np.log(np.exp(z).sum()) - z[label]
            terms.append(alpha * hard + (1 - alpha) * t**2 * (q * np.log(q / p)).sum())
    return float(np.mean(terms))


@pytest.mark.parametrize("pad", [-100, 0])
def test_shift_and_padding(rng: np.random.Generator, pad: int) -> None:
    student, teacher = rng.standard_normal((2, 3, 6, 5))
    labels = rng.integers(1, 5, (3, 6))
    labels[0, 4:] = labels[2, :2] = pad
    loss = TokenLevel(SoftTarget(2.0, 0.3), ignore_index=pad)
    found = loss(*map(torch.from_numpy, (student, teacher, labels)))
    assert float(found) == pytest.approx(by_hand(student, teacher, labels, pad, 0.3, 2.0), rel=1e-12)
    shifted = np.concatenate([labels[:, 1:], np.full((3, 1), pad)], 1)
    again = TokenLevel(SoftTarget(2.0, 0.3), ignore_index=pad, shift=False)
    torch.testing.assert_close(again(*map(torch.from_numpy, (student, teacher, shifted))), found)


def test_padding_gets_no_gradient_and_any_base_serves() -> None:
    student = torch.randn(2, 5, 4, requires_grad=True)
    teacher, labels = torch.randn(2, 5, 4), torch.tensor([[1, 2, 3, -100, -100], [0, 1, 2, 3, 1]])
    for base in (SoftTarget(2.0, 0.0), HardLabel(), Adaptive()):
        student.grad = None
        TokenLevel(base)(student, teacher, labels).backward()
        assert student.grad is not None
        assert (student.grad.abs().sum(-1) > 0).tolist() == [
            [True, True, False, False, False],
            [True] * 4 + [False],
        ]
    every = TokenLevel(SoftTarget(2.0, 0.0))(student, teacher, None)
    torch.testing.assert_close(every, SoftTarget(2.0, 0.0)(student, teacher, None))


def test_a_base_that_looks_inside_is_attached() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    loss = TokenLevel(FeatureHint("0", "0", base=SoftTarget(alpha=0.0)))
    ids = torch.randint(0, 5, (2, 6))
    with loss.attached(model, model):
        assert float(loss(model(ids), model(ids), ids).detach()) == pytest.approx(0.0, abs=1e-6)


def test_what_the_base_reports_is_reported() -> None:
    loss = TokenLevel(SoftTarget(alpha=0.3))
    assert not loss.components
    total = loss(torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randint(5, (2, 4)))
    parts = loss.components
    torch.testing.assert_close(0.3 * parts["hard"] + 0.7 * parts["soft"], total)
    assert not TokenLevel(Adaptive()).components


def test_bad_input_is_named() -> None:
    x, labels = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    loss = TokenLevel(SoftTarget())
    with pytest.raises(TypeError, match="TokenLevel: base must be a loss, got str"):
        TokenLevel("soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teacher's logits must be \[B, L, C\], got \[2, 4\]"):
        loss(x, x[:, 0], labels)
    with pytest.raises(TypeError, match=r"target must be int64 \[B, L\], got torch.int64 \[10\]"):
        loss(x, x, labels.reshape(-1))
    with pytest.raises(ValueError, match="two tokens or more"):
        loss(x[:, :1], x[:, :1], labels[:, :1])
    with pytest.raises(ValueError, match="name a class in at least one row"):
        loss(x, x, labels - 100)
