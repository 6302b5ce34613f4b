"""Students of fewer blocks: which are kept, that they are the teacher's, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.students.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.students import compare, cost, shrink_depth


class Block(nn.Module):
    in_place = False

    def __init__(self, width: int, change: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.change = change

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, float]:
        added = self.change * torch.tanh(self.fc(x))
        return (x.add_(added) if self.in_place else x + added), scale


class Encoder(nn.Module):
    def __init__(self, changes: tuple[float, ...] = (1.0, 0.1, 0.5, 0.01, 2.0, 0.2)) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block(16, change) for change in changes)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, scale = self.embed(tokens), 1.0
        for block in self.blocks:
            x, scale = block(x, scale=scale)
        return self.head(x)


def tokens() -> Tensor:
    return torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))


def changes_of(student: nn.Module) -> list[float]:
    return [block.change for block in student.blocks]


@pytest.mark.parametrize(
    ("count", "kept"),
    [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (4, [0, 2, 3, 5]), (5, [0, 1, 2, 4, 5]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_evenly_spaced(count: int, kept: list[int]) -> None:
    teacher = Encoder()
    student = shrink_depth(teacher, {"blocks": count}, tokens())
    assert [id(b) for b in teacher.blocks] not in [id(b) for b in student.blocks]
    for ours, index in zip(student.blocks, kept, strict=True):
        theirs = teacher.blocks[index]
        assert torch.equal(ours.fc.weight, theirs.fc.weight) and ours.fc.weight is not theirs.fc.weight
    assert list(student.blocks._modules) == [str(i) for i in range(count)]
    assert len(teacher.blocks) == 6


def test_named_indices_compute_what_the_teachers_blocks_do() -> None:
    teacher = Encoder().eval()
    student = shrink_depth(teacher, {"blocks": [1, 2, 4]}, tokens())
    x = teacher.embed(tokens())
    for index in (1, 2, 4):
        x, _ = teacher.blocks[index](x)
    assert torch.equal(student(tokens()), teacher.head(x))


@pytest.mark.parametrize("in_place", [False, True])
def test_by_importance_against_a_float64_count(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - cosine of input and output over all rows, by hand."""
    teacher = Encoder().double().eval()
    batches = [tokens(), tokens()[:1]]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Block, "in_place", in_place)
        student = shrink_depth(teacher, {"blocks": 3}, tokens(), select="importance", calibration=batches)
    sums, rows = [0.0] * 6, 0
    with torch.no_grad():
        for batch in batches:
            x = teacher.embed(batch)
            rows += batch.numel()
            for index, block in enumerate(teacher.blocks):
                y, _ = block(x)
                for a, b in zip(x.reshape(-1, 16), y.reshape(-1, 16), strict=True):
                    sums[index] += float(1 - (a @ b) / (a.norm() * b.norm()))
                x = y
    best = sorted(sorted(range(6), key=lambda i: -sums[i])[:3])
    assert changes_of(student) == [teacher.blocks[i].change for i in best]
    assert changes_of(student) == [1.0, 0.5, 2.0]


def test_blocks_that_change_the_shape_stay() -> None:
    teacher = ResNet((3, 4, 2, 1), width=8, classes=10)
    x = torch.randn(2, 3, 32, 32)
    student = shrink_depth(teacher, {"layer1": 1, "layer2": 2, "layer3": [0]}, x)
    assert [len(getattr(student, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 2, 1, 1]
    assert all(getattr(student, f"layer{i}")[0].downsample is not None for i in (1, 2, 3, 4))
    report = compare(teacher, student, x)
    assert report.student.parameters < report.teacher.parameters
    with pytest.raises(ValueError, match=r"keep of 'layer2' must hold \[0\], which change the shape"):
        shrink_depth(teacher, {"layer2": [1, 2]}, x)


class Counting(Encoder):
    """Goes through its blocks by a number of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index in range(6):
            x, _ = self.blocks[index](x)
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "keep", "options", "message"),
    [
        (Encoder, {"blocks": 0}, {}, r"keep of 'blocks' must be in \[1, 6\], got 0"),
        (Encoder, {"blocks": 7}, {}, r"must be in \[1, 6\], got 7"),
        (Encoder, {"blocks": [2, 1]}, {}, r"growing indices in \[0, 5\]"),
        (Encoder, {"blocks": [0, 6]}, {}, r"growing indices in \[0, 5\]"),
        (Encoder, {"blocks": True}, {}, "growing indices"),
        (Encoder, {"blocks": "12"}, {}, "growing indices"),
        (
            Encoder,
            {"layers": 2},
            {},
            "'layers' must be an nn.Sequential or nn.ModuleList, got nothing; .* has blocks",
        ),
        (Encoder, {"head": 2}, {}, "got Linear"),
        (Encoder, {}, {}, "keep must be a dict"),
        (Encoder, {"blocks": 2}, {"select": "odd"}, 'select must be "even" or "importance"'),
        (Encoder, {"blocks": 2}, {"select": "importance"}, "calibration must hold batches"),
        (Encoder, {"blocks": 2}, {"select": "importance", "calibration": []}, "at least one batch"),
        (Counting, {"blocks": 2}, {}, "the student must run on example_input, it fails with IndexError"),
    ],
)
def test_bad_input(make: Any, keep: Any, options: dict[str, Any], message: str) -> None:
    teacher = make()
    with pytest.raises(ValueError, match=message):
        shrink_depth(teacher, keep, tokens(), **options)
    assert len(teacher.blocks) == 6 and not any(b._forward_hooks for b in teacher.blocks)


def test_dropped_blocks_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[float] = []
    plain = copy.deepcopy

    class Noting(Block):
        def __deepcopy__(self, memo: dict[int, Any]) -> Block:
            copied.append(self.change)
            twin = Block(16, self.change)
            twin.load_state_dict(plain(self.state_dict()))
            return twin

    teacher = Encoder()
    teacher.blocks = nn.ModuleList(Noting(16, float(i)) for i in range(6))
    shrink_depth(teacher, {"blocks": 2}, tokens())
    assert copied == [0.0, 5.0]


def test_cost_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.BatchNorm1d(10),
    )
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = cost(model, torch.randn(5, 4, 8, 8))
    assert found.macs == 5 * (6 * 4 * 4 * 2 * 9 + 96 * 10)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert [(layer.name, layer.kind, layer.parameters) for layer in found.layers] == [
        ("0", "Conv2d", 6 * 2 * 9 + 6),
        ("2", "Linear", 970),
    ]
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "MACs" in str(found)


def test_compare_refuses_other_outputs() -> None:
    with pytest.raises(ValueError, match=r"the student must return .*\[2, 3\].* got .*\[2, 4\]"):
        compare(nn.Linear(5, 3), nn.Linear(5, 4), torch.randn(2, 5))


def test_students_train() -> None:
    student = shrink_depth(Encoder().requires_grad_(False), {"blocks": 2}, tokens())
    F.cross_entropy(student(tokens()).flatten(0, 1), tokens().flatten() % 5).backward()
    assert all(p.grad is not None for p in student.parameters())
