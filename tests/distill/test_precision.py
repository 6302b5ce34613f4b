"""Every loss in mixed precision and between models of different dtypes: computed in the student's float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.distill import (
    Adaptive,
    AttentionTransfer,
    DirectLogits,
    FeatureHint,
    GaussianKL,
    HardLabel,
    MultiTask,
    Mutual,
    PolicyKL,
    Regression,
    Relation,
    SoftTarget,
    SpatialAttention,
    TokenLevel,
    Uncertainty,
)


class Model(nn.Module):
    """Images to tokens to logits [B, L, 4], with something for each loss to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


LABELS = torch.arange(6 * 9).reshape(6, 9) % 4
LOSSES: dict[str, tuple[Any, Any]] = {
    "soft": (SoftTarget(), LABELS),
    "hard": (HardLabel(0.5), LABELS),
    "direct": (DirectLogits(), LABELS),
    "regression": (Regression(), None),
    "huber": (Regression(distance="huber"), None),
    "adaptive": (Adaptive("entropy"), LABELS),
    "policy": (PolicyKL(0.5), None),
    "distance": (Relation("distance"), None),
    "angle": (Relation("angle", student_layer="conv", teacher_layer="conv"), None),
    "similarity": (Relation("similarity"), None),
    "attention kl": (AttentionTransfer({"attention": "attention"}), None),
    "attention mse": (AttentionTransfer({"attention": "attention"}, distance="mse", heads="each"), None),
    "spatial": (SpatialAttention({"conv": "conv"}), None),
    "hint": (FeatureHint("conv", "conv", channels=(8, 8)), None),
    "tokens": (TokenLevel(SoftTarget()), LABELS),
    "uncertainty": (Uncertainty(DirectLogits(), SoftTarget(alpha=0.0)), None),
    "gaussian": (lambda s, t, y: GaussianKL()((s, s.mean() * 0), (t, t.mean() * 0), y), None),
    "mutual": (lambda s, t, y: Mutual(0.0)((s, t), None, y), None),
    "heads": (lambda s, t, y: MultiTask([SoftTarget(alpha=0.0)])((s,), (t,), y), None),
}


def value(loss: Any, teacher: nn.Module, student: nn.Module, x: Tensor, target: Any) -> Tensor:
    if not hasattr(loss, "attached"):
        return loss(student(x), teacher(x.to(next(teacher.parameters()).dtype)).detach(), target)
    with loss.attached(teacher, student):
        with torch.no_grad():
            told = teacher(x.to(next(teacher.parameters()).dtype))
        return loss(student(x), told, target)


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_and_with_a_teacher_in_double(name: str) -> None:
    loss, target = LOSSES[name]
    torch.manual_seed(0)
    teacher, student, x = Model().eval(), Model(), torch.randn(6, 2, 3, 3)
    exact = value(loss, teacher, student, x, target)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = value(loss, teacher, student, x, target)
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), rel=0.1, abs=2e-3)
    mixed.backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert any(float(grad.abs().max()) > 0 for grad in grads)
    student.zero_grad()
    double = value(loss, copy.deepcopy(teacher).double(), student, x, target)
    assert double.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-5)
    double.backward()
