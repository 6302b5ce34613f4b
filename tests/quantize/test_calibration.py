"""Calibrating a model: what is seen, what is named, and that nothing is left behind."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.factorize import factorize
from tautorch.quantize import Kl, MinMax, Mse, Percentile, QParams, calibrate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 8)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        x = self.drop(torch.relu(self.conv(input=x * gain)))
        return self.fc(self.fc(x.flatten(1))[:, :1].repeat(1, 16))


@pytest.mark.parametrize(
    ("name", "make"), [("minmax", MinMax), ("mse", Mse), ("kl", Kl), ("percentile", Percentile)]
)
def test_every_call_of_every_layer_is_seen(name: str, make: Any) -> None:
    model, batches = Net().eval(), [torch.randn(5, 2, 4, 4), torch.randn(3, 2, 4, 4) * 2]
    found = calibrate(model, batches, name)
    conv, fc = make(), make()
    with torch.no_grad():
        for x in batches:
            conv.observe(x)
            hidden = torch.relu(model.conv(x)).flatten(1)
            fc.observe(hidden)
            fc.observe(model.fc(hidden)[:, :1].repeat(1, 16))
    assert found == {"conv": conv.qparams(), "fc": fc.qparams()}


def test_options() -> None:
    model, batches = Net(), [(torch.randn(5, 2, 4, 4), 2.0), {"x": torch.randn(5, 2, 4, 4), "gain": 3.0}]
    symmetric = calibrate(model, batches, layers=["conv"], symmetric=True)
    assert symmetric["conv"].zero_point == 0
    assert list(symmetric) == ["conv"]
    wide = calibrate(model, batches, partial(Percentile, 100), layers=["c*"])["conv"]
    narrow = calibrate(model, batches, partial(Percentile, 90), layers=["c*"])["conv"]
    assert narrow.scale < 0.7 * wide.scale


def test_factors_are_layers_like_others() -> None:
    model = factorize(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), rank=2)
    assert list(calibrate(model, [torch.randn(4, 16)])) == ["0.down", "0.up", "2.down", "2.up"]


def test_half_precision_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.bfloat16)
    assert calibrate(model, [x], "minmax") == {"0": QParams(float(torch.tensor(4 / 255)), -64)}


def test_calibration_leaves_no_trace() -> None:
    model = Net()
    model.fc.eval()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="got NaN or Inf at layer 'conv'"):
        calibrate(model, [torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), torch.nan)])
    calibrate(model, [torch.ones(1, 2, 4, 4)])
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert (model.training, model.fc.training, model.conv.training) == (True, False, True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"observer": "entropy"}, ValueError, "observer must be one of minmax, percentile, mse, kl"),
        ({"layers": ["head"]}, ValueError, "must name layers of the model, got 'head'"),
        ({"layers": ["unused"]}, ValueError, "calibration must reach layer 'unused'"),
        ({"layers": ["drop"]}, ValueError, "it must be nn.Linear or nn.Conv2d, got Dropout"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": torch.ones(1, 2, 4, 4)}, TypeError, "must be an iterable of batches"),
        ({"batches": [[torch.ones(1, 2, 4, 4), 0]]}, TypeError, "from a DataLoader"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"batches": [torch.ones(1, 2, 4, 4)]}
    with pytest.raises(error, match=message):
        calibrate(Net(), **(arguments | options))
