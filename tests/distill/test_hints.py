"""Feature hints: the term, the adapter, and what attaching refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautorch.distill import ChannelAdapter, Distiller, FeatureHint, SoftTarget


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return teacher, student


def test_the_term_is_the_weighted_mean_square() -> None:
    teacher, student = (model.double() for model in pair())
    hint = FeatureHint("1", "1", channels=(8, 16), base=SoftTarget(2.0, 0.0), weight=0.5).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with hint.attached(teacher, student):
        t, s = teacher(x), student(x)
        loss = hint(s, t, None)
    assert hint.adapter is not None
    mine = torch.relu(student[0](x)) @ hint.adapter.weight.T + hint.adapter.bias
    expected = 0.5 * (mine - torch.relu(teacher[0](x))).square().mean() + SoftTarget(2.0, 0.0)(s, t, None)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert not student[1]._forward_hooks
    assert not teacher[1]._forward_hooks


def test_the_adapter_maps_channels_of_images_and_rows_alike() -> None:
    adapter = ChannelAdapter(3, 5)
    image = torch.randn(2, 3, 4, 4)
    rows = adapter(image.permute(0, 2, 3, 1).reshape(2, 16, 3))
    torch.testing.assert_close(adapter(image).flatten(2).transpose(1, 2), rows)


def test_a_distiller_trains_student_and_adapter() -> None:
    teacher, student = pair()
    hint = FeatureHint("0", "0", channels=(8, 16))
    data = [(torch.randn(16, 6), None) for _ in range(4)]
    optimizer = torch.optim.Adam([*student.parameters(), *hint.parameters()], 0.02)
    history = Distiller(teacher, student, hint, optimizer, progress=False).fit(data, 30)
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]


def test_a_layer_after_it_may_work_in_place() -> None:
    teacher, student = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)) for _ in "ts")
    hint = FeatureHint("0", "0")
    x = torch.randn(5, 6)
    with hint.attached(teacher, student):
        loss = hint(student(x), teacher(x), None)
    torch.testing.assert_close(loss, (student[0](x) - teacher[0](x)).square().mean())


def test_nested_hints_each_see_their_layer() -> None:
    teacher, student = pair()
    inner = FeatureHint("2", "2")
    outer = FeatureHint("0", "0", channels=(8, 16), base=inner)
    x = torch.randn(5, 6)
    with outer.attached(teacher, student):
        s, t = student(x), teacher(x)
        loss = outer(s, t, None)
    assert outer.adapter is not None
    expected = (s - t).square().mean() + (outer.adapter(student[0](x)) - teacher[0](x)).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_distiller_wants_the_adapter_in_the_optimizer() -> None:
    teacher, student = pair()
    hint = FeatureHint("0", "0", channels=(8, 16))
    with pytest.raises(ValueError, match=r"hold the loss's own parameters, got no adapter.weight"):
        Distiller(teacher, student, hint, torch.optim.SGD(student.parameters(), 0.1))


def test_bad_input_is_named() -> None:
    teacher, student = pair()
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="ChannelAdapter: out_channels must be an int >= 1, got -1"):
        FeatureHint("0", "0", channels=(4, -1))
    with pytest.raises(ValueError, match="weight must be a finite number > 0"):
        FeatureHint("0", "0", weight=0.0)
    with (
        pytest.raises(
            ValueError, match="the teacher's layer must be one of its modules, got 'deep'; it has 0, 1, 2"
        ),
        FeatureHint("0", "deep").attached(teacher, student),
    ):
        pass
    assert not student[0]._forward_hooks
    hint = FeatureHint("0", "0")
    with pytest.raises(ValueError, match="got no feature of the student's '0' and the teacher's '0'"):
        hint(student(x), teacher(x), None)
    with (
        hint.attached(teacher, student),
        pytest.raises(ValueError, match=r"one shape, got \[2, 8\].*\[2, 16\]"),
    ):
        hint(student(x), teacher(x), None)
    wrong = FeatureHint("0", "0", channels=(5, 16))
    with wrong.attached(teacher, student), pytest.raises(ValueError, match="5 channels in dim -1"):
        wrong(student(x), teacher(x), None)
