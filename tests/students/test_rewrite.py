"""Depthwise-separable and channel-shuffle students: started from the teacher, of its shapes, and smaller."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.students.resnet import ResNet, resnet50
from torch import Tensor, nn
from torch.nn import functional as F

import tautorch as tt
from tautorch.students import channel_shuffle, compare, cost, depthwise_separable
from tautorch.students.checks import check_same_outputs


def small() -> ResNet:
    torch.manual_seed(0)
    return ResNet((1, 2, 1, 1), width=8, classes=10)


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def damped(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Least squares of a x = b, with rows that ask for `start`, a hundredth of the mean moment in weight."""
    row = np.sqrt(0.01 * np.mean(np.sum(a * a, 0))) * np.eye(a.shape[1])
    return np.linalg.lstsq(np.vstack([a, row]), np.vstack([b, row @ start]), rcond=None)[0]


@pytest.mark.parametrize("multiplier", [1, 3])
def test_separable_weights_are_the_best_of_their_rank(multiplier: int) -> None:
    """Against numpy's SVD of each input channel's filters [O, kh * kw]."""
    conv = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)).double()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    student = depthwise_separable(nn.Sequential(conv), x, multiplier=multiplier)
    weight = conv.weight.detach().numpy()
    best = np.empty_like(weight)
    for channel in range(8):
        u, s, v = np.linalg.svd(weight[:, channel].reshape(12, 6), full_matrices=False)
        best[:, channel] = ((u[:, :multiplier] * s[:multiplier]) @ v[:multiplier]).reshape(12, 3, 2)
    expected = F.conv2d(x, torch.from_numpy(best), conv.bias, conv.stride, conv.padding, conv.dilation)
    torch.testing.assert_close(student(x), expected, rtol=1e-10, atol=1e-12)
    depthwise, pointwise = student[0].depthwise, student[0].pointwise
    assert depthwise.groups == 8 and depthwise.weight.shape == (8 * multiplier, 1, 3, 2)
    assert depthwise.bias is None and pointwise.kernel_size == (1, 1)
    assert (depthwise.stride, depthwise.padding, depthwise.dilation) == ((2, 1), (1, 0), (1, 2))


def test_separable_fitted_to_inputs_is_the_least_squares() -> None:
    """The 1x1 weights, by numpy's least squares on the depthwise outputs."""
    conv = nn.Conv2d(8, 10, 3, padding=1, bias=False).double()
    mix = torch.randn(8, 8, dtype=torch.float64)
    x = F.conv2d(torch.randn(6, 8, 7, 7, dtype=torch.float64), mix[:, :, None, None])
    plain = depthwise_separable(nn.Sequential(conv), x)
    fitted = depthwise_separable(nn.Sequential(conv), x, calibration=[x[:3], x[3:]])
    middle = fitted[0].depthwise(x).detach().transpose(0, 1).flatten(1).T.numpy()
    wanted = conv(x).detach().transpose(0, 1).flatten(1).T.numpy()
    filters = fitted[0].depthwise.weight.detach().reshape(8, 9).numpy()
    weight = conv.weight.detach().reshape(10, 8, 9).numpy()
    # What the filters take of the weight on the inputs seen: the start that damping pulls to.
    columns = F.unfold(x, 3, padding=1).reshape(6, 8, 9, -1).permute(1, 0, 3, 2).flatten(1, 2).numpy()
    start = np.empty((8, 10))
    for c in range(8):
        moment = columns[c].T @ columns[c]
        start[c] = weight[:, c] @ moment @ filters[c] / (filters[c] @ moment @ filters[c])
    solution = damped(middle, wanted, start)
    np.testing.assert_allclose(fitted[0].pointwise.weight.detach().flatten(1).numpy(), solution.T, atol=1e-8)
    errors = [float((s(x) - conv(x)).detach().norm()) for s in (plain, fitted)]
    assert errors[1] < 0.97 * errors[0]


def test_separable_with_norm_as_in_mobilenet() -> None:
    student = depthwise_separable(small(), images(), between="norm")
    block = student.layer1[0].conv2
    assert [type(m) for m in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert bool((block.depthwise.weight.sum((1, 2, 3)) >= 0).all())


@pytest.mark.parametrize("fitted", [False, True])
def test_shuffled_outputs_by_hand(fitted: bool) -> None:
    """Output c is a 1x1 convolution of the inputs of group c mod 4, one output at a time."""
    conv = nn.Conv2d(12, 8, 1, stride=2).double()
    x = torch.randn(3, 12, 6, 6, dtype=torch.float64)
    student = channel_shuffle(nn.Sequential(conv), x, calibration=[x] if fitted else None)
    got = student(x)
    assert student[0].grouped.groups == 4 and isinstance(student[0].shuffle, nn.ChannelShuffle)
    rows = x[:, :, ::2, ::2].transpose(0, 1).flatten(1).T.numpy()
    for c in range(8):
        own = slice(3 * (c % 4), 3 * (c % 4) + 3)
        weight = conv.weight.detach()[c, :, 0, 0].numpy()
        kept = weight[own]
        if fitted:
            kept = damped(rows[:, own], (rows @ weight)[:, None], kept[:, None])[:, 0]
        by_hand = rows[:, own] @ kept + conv.bias.detach()[c].numpy()
        np.testing.assert_allclose(got[:, c].detach().flatten().numpy(), by_hand, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fitted", [False, True])
def test_depthwise_keeps_the_diagonal(fitted: bool) -> None:
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(5, 8, 9, 9, dtype=torch.float64)
    student = channel_shuffle(nn.Sequential(conv), x, calibration=[x] if fitted else None)
    depthwise = student[0]
    assert depthwise.groups == 8
    if not fitted:
        expected = torch.stack([conv.weight[c, c] for c in range(8)])[:, None]
        assert torch.equal(depthwise.weight, expected)
        return
    columns = (
        F.unfold(x, 3, padding=1, stride=2).reshape(5, 8, 9, -1).permute(1, 0, 3, 2).flatten(1, 2).numpy()
    )
    wanted = conv(x).detach().transpose(0, 1).flatten(1).numpy()
    for c in range(8):
        start = conv.weight[c, c].detach().reshape(9, 1).numpy()
        solution = damped(columns[c], wanted[c][:, None], start)[:, 0]
        np.testing.assert_allclose(depthwise.weight[c].detach().flatten().numpy(), solution, atol=1e-8)


@pytest.mark.parametrize("rewrite", [depthwise_separable, channel_shuffle])
def test_students_of_a_resnet(rewrite: Any, tmp_path: Path) -> None:
    teacher = small()
    before = copy.deepcopy(teacher.state_dict())
    state = torch.get_rng_state()
    student = rewrite(teacher, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert type(student.conv1) is nn.Conv2d  # the stem
    report = compare(teacher, student, images())
    assert report.student.parameters < 0.8 * report.teacher.parameters
    assert report.student.macs < 0.85 * report.teacher.macs
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert student.training and all(p.requires_grad for p in student.parameters())
    F.cross_entropy(student(images()), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None for p in student.parameters())
    student.eval()
    tt.save(student, tmp_path / "s.safetensors")
    loaded = tt.load(tmp_path / "s.safetensors", small).eval()
    assert torch.equal(loaded(images()), student(images()))


@pytest.mark.parametrize("rewrite", [depthwise_separable, channel_shuffle])
def test_calibration_brings_a_student_nearer(rewrite: Any) -> None:
    teacher, x = small().eval(), images(8)
    errors = []
    for options in ({}, {"calibration": [x[:4], x[4:]]}):
        student = rewrite(teacher, x, **options)
        with torch.no_grad():
            errors.append(float((student(x) - teacher(x)).norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("rewrite", "parameters"),
    # Counted from the paper's table of layers: 25,557,032 of ResNet-50; a 3x3 of C to C channels has 9 C^2.
    [
        (
            depthwise_separable,
            25_557_032 - sum(n * (8 * c * c - 9 * c) for n, c in ((3, 64), (4, 128), (6, 256), (3, 512))),
        )
    ],
)
def test_resnet50_separable(rewrite: Any, parameters: int) -> None:
    teacher = resnet50()
    student = rewrite(teacher, images(1))
    counted = cost(student, images(1))
    assert cost(teacher, images(1)).parameters == 25_557_032
    assert counted.parameters == parameters
    strides = [student.get_submodule(f"layer{s}.0.conv2").depthwise.stride for s in (1, 2, 3, 4)]
    assert strides == [(1, 1), (2, 2), (2, 2), (2, 2)]


def test_resnet50_shuffle() -> None:
    """A quarter of each 1x1 weight remains and 9 of each channel's 3x3."""
    student = channel_shuffle(resnet50(), images(1))
    ones = sum(
        m.weight.numel() for m in student.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)
    )
    threes = sum(
        m.weight.numel() for m in student.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    )
    assert threes == 9 * sum(n * c for n, c in ((3, 64), (4, 128), (6, 256), (3, 512)))
    per_stage = ((3, 64, 64), (4, 256, 128), (6, 512, 256), (3, 1024, 512))
    dense = sum(n * 8 * c * c + (i - 4 * c) * c + i * 4 * c for n, i, c in per_stage)
    assert ones == dense // 4


@pytest.mark.parametrize(
    ("rewrite", "options", "message"),
    [
        (depthwise_separable, {"multiplier": 0}, "multiplier must be an int >= 1"),
        (depthwise_separable, {"between": "relu"}, 'between must be "linear" or "norm"'),
        (
            depthwise_separable,
            {"between": "norm", "calibration": [images()]},
            "calibration fits linear layers",
        ),
        (depthwise_separable, {"layers": ["layer1.0.conv1"]}, "cannot be rewritten: it is 1x1"),
        (depthwise_separable, {"multiplier": 9}, "got none that fits"),
        (depthwise_separable, {"layers": ["fc"]}, "must be nn.Conv2d"),
        (depthwise_separable, {"calibration": []}, "at least one batch"),
        (channel_shuffle, {"groups": 1}, "groups must be an int >= 2"),
        (channel_shuffle, {"groups": 3, "layers": ["layer1.0.conv1"]}, "3 groups do not divide"),
        (channel_shuffle, {"layers": ["conv1"]}, "as many outputs as inputs"),
        (channel_shuffle, {"depthwise": False, "layers": ["layer1.0.conv2"]}, "it is larger than 1x1"),
    ],
)
def test_bad_input(rewrite: Any, options: dict[str, Any], message: str) -> None:
    teacher = small()
    before = dict(teacher.named_modules())
    with pytest.raises(ValueError, match=message):
        rewrite(teacher, images(), **options)
    assert dict(teacher.named_modules()) == before


def test_not_finite_weights() -> None:
    teacher = small()
    with torch.no_grad():
        teacher.layer1[0].conv2.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"weight of layer 'layer1.0.conv2' must be finite"):
        depthwise_separable(teacher, images())


def test_a_frozen_teacher_gives_a_student_that_trains() -> None:
    teacher = small().requires_grad_(False)
    assert all(p.requires_grad for p in depthwise_separable(teacher, images()).parameters())
    teacher.fc.requires_grad_(True)
    student = depthwise_separable(teacher, images())
    assert [n for n, p in student.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


class Held(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(y=self.fc(x))


def test_outputs_held_by_objects_are_checked() -> None:
    x = torch.randn(2, 4)
    check_same_outputs("here", Held(3), Held(3), x)
    with pytest.raises(ValueError, match="here: the student must return"):
        check_same_outputs("here", Held(3), Held(5), x)


class WSConv(nn.Conv2d):
    """Standardises its weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("make", [depthwise_separable, channel_shuffle])
def test_a_subclass_that_computes_more_is_left(make: Any) -> None:
    model = nn.Sequential(WSConv(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(1, 8, 6, 6)
    with pytest.raises(ValueError, match=r"layer '0' .*WSConv has a _conv_forward of its own"):
        make(model, x, layers=["0"])
    student = make(model, x)
    assert type(student[0]) is WSConv
    assert torch.equal(student[0](x), model[0](x))
