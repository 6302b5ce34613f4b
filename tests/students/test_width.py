"""Students of fewer channels: smaller in every coupled layer, the teacher left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.students.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.students import compare, shrink_width


class Block(nn.Module):
    """Pre-norm attention and MLP, heads of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 8
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out, self.fc1, self.fc2 = (
            nn.Linear(width, width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            p(h).reshape(h.shape[0], h.shape[1], self.heads, 8).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_the_hidden_units_kept_are_the_heaviest() -> None:
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        teacher[0].weight.mul_(torch.tensor([1.0, 9, 1, 9, 1, 9, 9, 1])[:, None])
    student = shrink_width(teacher, torch.randn(2, 6), 0.5, round_to=1)
    kept = [1, 3, 5, 6]
    assert torch.equal(student[0].weight, teacher[0].weight[kept])
    assert torch.equal(student[0].bias, teacher[0].bias[kept])
    assert torch.equal(student[2].weight, teacher[2].weight[:, kept])
    assert teacher[0].weight.shape == (8, 6)


def test_a_resnet_shrinks_everywhere() -> None:
    teacher = ResNet((1, 2, 1, 1), width=16, classes=10)
    before = copy.deepcopy(teacher.state_dict())
    x = torch.randn(2, 3, 32, 32)
    student = shrink_width(teacher, x, 0.5, round_to=4)
    report = compare(teacher, student, x)
    assert report.student.parameters < 0.35 * report.teacher.parameters
    assert report.student.macs < 0.35 * report.teacher.macs
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    F.cross_entropy(student(x), torch.tensor([0, 1])).backward()


def test_heads_and_hidden_units_of_a_transformer() -> None:
    teacher = nn.Sequential(nn.Linear(5, 32), Block(32), nn.Linear(32, 7))
    heads = {f"1.{p}": 4 for p in "qkv"}
    x = torch.randn(2, 6, 5)
    student = shrink_width(teacher, x, 0.5, heads=heads, round_to=8, protect=["0"])
    block = student[1]
    assert block.heads == 2 and block.q.out_features == block.v.out_features == 16
    assert block.fc1.out_features == 64 and block.out.in_features == 16
    assert student(x).shape == teacher(x).shape


@pytest.mark.parametrize("keep", [0, 1.5, -0.5, True, "half"])
def test_keep_out_of_range(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
        shrink_width(nn.Linear(4, 4), torch.randn(1, 4), keep)


def test_a_failure_leaves_the_teacher() -> None:
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    with pytest.raises(ValueError):
        shrink_width(teacher, torch.randn(2, 6), 0.5, layers=["nope"])
    assert not any(p.requires_grad for p in teacher.parameters())
    student = shrink_width(teacher, torch.randn(2, 6), 0.5, round_to=1)
    assert all(p.requires_grad for p in student.parameters())
