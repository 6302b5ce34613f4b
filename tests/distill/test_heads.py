"""Light heads start as the least-squares fit of the heavy ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tautorch.distill import Distiller, SoftTarget, light_head


class Net(nn.Module):
    """A convolutional body and a heavy head on its flattened 6 x 4 x 4 features."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def heavy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5))


def least_squares(x: Any, y: Any) -> Any:
    ones = np.concatenate([x, np.ones((len(x), 1))], 1)
    return np.linalg.lstsq(ones, y, rcond=None)[0]


@pytest.mark.parametrize("first", [nn.Identity(), nn.Hardtanh(0.0, 0.1, inplace=True)])
@pytest.mark.parametrize("channels", [None, 6])
def test_the_linear_head_is_the_least_squares_fit(channels: int | None, first: nn.Module) -> None:
    model = Net(nn.Sequential(first, *heavy())).double()
    batches = [torch.randn(40, 2, 4, 4, dtype=torch.float64) for _ in range(5)]
    x = torch.cat(batches)
    old = copy.deepcopy(model).eval()
    with torch.no_grad():
        y, features = old(x).numpy(), old.body(x).flatten(1).numpy()
    if channels is not None:
        features = features.reshape(200, 6, 16).mean(-1)
    expected = least_squares(features, y)
    assert light_head(model, "head", batches, channels=channels) is model
    linear = model.head[-1]
    np.testing.assert_allclose(linear.weight.detach().numpy().T, expected[:-1], atol=2e-4)
    np.testing.assert_allclose(linear.bias.detach().numpy(), expected[-1], atol=2e-4)
    assert model.training
    assert model.head.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_bottleneck_is_the_best_of_its_rank() -> None:
    model = Net(heavy()).double()
    x = torch.randn(300, 2, 4, 4, dtype=torch.float64)
    old = copy.deepcopy(model).eval()
    light_head(model, "head", [x], rank=2)
    with torch.no_grad():
        y, features = old(x).numpy(), old.body(x).flatten(1).numpy()
        found = model.eval()(x).numpy()
    fit = least_squares(features, y)
    fitted = np.concatenate([features, np.ones((300, 1))], 1) @ fit
    mean = fitted.mean(0)
    u, s, v = np.linalg.svd(fitted - mean, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2] + mean
    assert ((found - y) ** 2).sum() == pytest.approx(((best - y) ** 2).sum(), rel=1e-4)
    assert [tuple(layer.weight.shape) for layer in model.head] == [(2, 96), (5, 2)]


def test_no_random_numbers_are_drawn() -> None:
    model, calibration = Net(heavy()), [torch.randn(40, 2, 4, 4)]
    before = torch.get_rng_state()
    light_head(model, "head", calibration, rank=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_calibration_a_linear_head_is_cut_by_svd() -> None:
    model = Net(nn.Linear(96, 5))
    weight, bias = model.head.weight.detach().double().numpy(), model.head.bias.detach().clone()
    light_head(model, "head", rank=2)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    product = (model.head[1].weight @ model.head[0].weight).detach().numpy()
    np.testing.assert_allclose(product, (u[:, :2] * s[:2]) @ v[:2], atol=1e-6)
    torch.testing.assert_close(model.head[1].bias.detach(), bias)
    assert model.head[1].weight.dtype == torch.float32


def test_it_is_distilled_like_any_student() -> None:
    model = Net(heavy())
    teacher = copy.deepcopy(model).eval()
    x = [torch.randn(32, 2, 4, 4) for _ in range(3)]
    light_head(model, "head", x, channels=6)
    before = copy.deepcopy(model.body.state_dict())
    optimizer = torch.optim.Adam(model.head.parameters(), 0.02)
    history = Distiller(teacher, model, SoftTarget(2.0, 0.0), optimizer, progress=False).fit(x, 10)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(value, model.body.state_dict()[name]) for name, value in before.items())


def test_bad_input_is_named_and_changes_nothing() -> None:
    model, x = Net(heavy()), [torch.randn(8, 2, 4, 4)]
    before = copy.deepcopy(model.state_dict())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"name": "tail"}, ValueError, r"must be of a module, got 'tail'; the model ends with .*head.3"),
        ({"rank": 2}, ValueError, "calibration must be given unless an nn.Linear head gets a rank"),
        ({"calibration": []}, ValueError, "at least one batch"),
        ({"calibration": x, "rank": 5}, ValueError, "rank must be below inputs and outputs, 96 and 5, got 5"),
        ({"calibration": x, "rank": 0}, ValueError, "rank must be an int >= 1"),
        ({"calibration": x, "channels": 7}, ValueError, r"features must be \[B, 7 \* positions\]"),
        ({"calibration": [x[0] * float("nan")]}, ValueError, "finite features"),
        ({"name": "head.3", "calibration": x}, ValueError, "must make the head lighter"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            light_head(model, **{"name": "head", **arguments})
    assert isinstance(model.head[0], nn.Linear)
    assert not model.head._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class ScaledLinear(nn.Linear):
    """Computes more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_head_that_computes_more_needs_calibration() -> None:
    model = Net(ScaledLinear(96, 80))
    with pytest.raises(ValueError, match="calibration must be given for layer 'head': ScaledLinear has a fo"):
        light_head(model, "head", rank=4)
    assert type(model.head) is ScaledLinear
