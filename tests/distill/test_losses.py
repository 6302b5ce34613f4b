"""Losses against float64 computations by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tautorch.distill import DirectLogits, HardLabel, SoftTarget

Array = np.ndarray[Any, np.dtype[np.float64]]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def cross_entropy(logits: Array, target: Any) -> float:
    return float(-log_softmax(logits)[np.arange(len(logits)), target].mean())


def soft_by_hand(student: Array, teacher: Array, target: Any, temperature: float, alpha: float) -> float:
    p, q = log_softmax(student / temperature), log_softmax(teacher / temperature)
    kl = (np.exp(q) * (q - p)).sum() / len(student)
    return alpha * cross_entropy(student, target) + (1 - alpha) * temperature**2 * float(kl)


@pytest.fixture
def logits(rng: np.random.Generator) -> tuple[Array, Array, Any]:
    return rng.standard_normal((7, 5)) * 3, rng.standard_normal((7, 5)) * 3, rng.integers(0, 5, 7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20])
@pytest.mark.parametrize("alpha", [0, 0.1, 1.0])
def test_soft_target(logits: tuple[Array, Array, Any], temperature: float, alpha: float) -> None:
    student, teacher, target = logits
    loss = SoftTarget(temperature, alpha)(*map(torch.from_numpy, logits))
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(soft_by_hand(student, teacher, target, temperature, alpha), rel=1e-12)


def test_soft_target_gradient_is_t_times_the_difference_of_the_softened_outputs(
    logits: tuple[Array, Array, Any],
) -> None:
    student, teacher, _ = logits
    x = torch.from_numpy(student).requires_grad_()
    SoftTarget(4.0, 0.0)(x, torch.from_numpy(teacher), None).backward()
    expected = 4.0 * (np.exp(log_softmax(student / 4)) - np.exp(log_softmax(teacher / 4))) / 7
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_equal_logits_cost_nothing(logits: tuple[Array, Array, Any]) -> None:
    x = torch.from_numpy(logits[0])
    assert float(SoftTarget(3.0, 0.0)(x, x + 2.0, None)) == pytest.approx(0.0, abs=1e-14)
    assert float(DirectLogits()(x, x, None)) == 0.0


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
def test_hard_label(logits: tuple[Array, Array, Any], alpha: float) -> None:
    student, teacher, target = logits
    expected = alpha * cross_entropy(student, target)
    expected += (1 - alpha) * cross_entropy(student, teacher.argmax(-1))
    assert float(HardLabel(alpha)(*map(torch.from_numpy, logits))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0, 0.3])
def test_direct_logits(logits: tuple[Array, Array, Any], alpha: float) -> None:
    student, teacher, target = logits
    expected = alpha * cross_entropy(student, target) + (1 - alpha) * ((student - teacher) ** 2).mean()
    assert float(DirectLogits(alpha)(*map(torch.from_numpy, logits))) == pytest.approx(expected, rel=1e-12)


def test_sequences_count_each_position_and_skip_ignored_ones(logits: tuple[Array, Array, Any]) -> None:
    student, teacher, target = logits
    marked = target.copy()
    marked[[1, 4]] = -100
    kept = np.flatnonzero(marked >= 0)
    expected = soft_by_hand(student[kept], teacher[kept], target[kept], 2.0, 0.4)
    pair = [torch.from_numpy(a).reshape(1, 7, 5) for a in (student, teacher)]
    loss = SoftTarget(2.0, 0.4)(*pair, torch.from_numpy(marked).reshape(1, 7))
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_probabilities_as_targets(logits: tuple[Array, Array, Any], rng: np.random.Generator) -> None:
    student, teacher, _ = logits
    target = rng.dirichlet(np.ones(5), 7)
    expected = float(-(target * log_softmax(student)).sum(-1).mean())
    loss = SoftTarget(alpha=1.0)(*map(torch.from_numpy, (student, teacher, target)))
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_computed_in_float32(logits: tuple[Array, Array, Any]) -> None:
    student, teacher = (torch.from_numpy(a).to(torch.bfloat16) for a in logits[:2])
    loss = SoftTarget(2.0, 0.5)(student, teacher, torch.from_numpy(logits[2]))
    assert loss.dtype == torch.float32
    expected = soft_by_hand(student.double().numpy(), teacher.double().numpy(), logits[2], 2.0, 0.5)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_classes_that_both_rule_out_cost_nothing(logits: tuple[Array, Array, Any]) -> None:
    """Masked actions: minus infinity in both outputs."""
    mask = np.arange(5) > 2
    pair = [torch.from_numpy(z.copy()).masked_fill(torch.from_numpy(mask), -math.inf) for z in logits[:2]]
    pair[0].requires_grad_()
    loss = SoftTarget(2.0, 0.0)(*pair, None)
    expected = soft_by_hand(logits[0][:, :3], logits[1][:, :3], np.zeros(7, dtype=int), 2.0, 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert pair[0].grad is not None
    assert bool(torch.isfinite(pair[0].grad).all())


def test_no_gradient_reaches_the_teacher(logits: tuple[Array, Array, Any]) -> None:
    student, teacher = (torch.from_numpy(a).requires_grad_() for a in logits[:2])
    for loss in (SoftTarget(alpha=0), HardLabel(), DirectLogits()):
        loss(student, teacher, None).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTarget(0.0), "temperature must be a finite number > 0, got 0.0"),
        (lambda: SoftTarget(math.inf), "temperature must be"),
        (lambda: SoftTarget("4"), "temperature must be"),  # type: ignore[arg-type]
        (lambda: SoftTarget(4.0, 1.5), r"SoftTarget: alpha must be a number in \[0, 1\], got 1.5"),
        (lambda: HardLabel(-0.1), r"HardLabel: alpha"),
        (lambda: DirectLogits(math.nan), r"DirectLogits: alpha"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, torch.zeros(3, 5), None), ValueError, r"one shape, got \[3, 4\] and \[3, 5\]"),
        (
            (X, {"logits": X}, None),
            TypeError,
            "teacher's output must be a tensor of logits, got dict; give Distil",
        ),
        (
            (torch.zeros(4), torch.zeros(4), None),
            ValueError,
            r"student's logits must be floating point \[..., C\]",
        ),
        ((X.long(), X, None), ValueError, "student's logits must be floating point"),
        ((X[:0], X[:0], torch.zeros(0).long()), ValueError, "at least one row"),
        ((X, X, None), ValueError, "target must be given with alpha=0.5"),
        ((X, X, [0, 1, 2]), TypeError, "target must be a tensor, got list"),
        ((X, X, torch.zeros(2).long()), ValueError, "one class for each of 3 rows"),
        ((X, X, torch.zeros(3).int()), ValueError, "target must be int64"),
        ((X, X, torch.tensor([0, 4, 1])), ValueError, r"classes must be in \[0, 4\), got 0 to 4"),
        ((X, X, torch.tensor([0, -1, 1])), ValueError, r"classes must be in \[0, 4\)"),
        ((X, X, torch.full((3,), -100)), ValueError, "name a class in at least one row"),
        ((X, X, torch.zeros(3, 5)), ValueError, "target probabilities must be like the logits"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftTarget(alpha=0.5)(*arguments)
