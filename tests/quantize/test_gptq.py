"""GPTQ against the column by column solution, and what is left on the model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tautorch
from tautorch.nn import Int8Conv2d, Int8Linear, SparseLinear
from tautorch.prune import prune
from tautorch.quantize import Rounded, calibrate, gptq, prepare_qat
from tautorch.quantize.gptq import gptq_integers


def by_hand(
    weight: np.ndarray, gram: np.ndarray, steps: np.ndarray, top: int, mask: np.ndarray | None
) -> np.ndarray:
    """Optimal brain surgery with the inverse of what is left at each column (equations 2 and 3)."""
    columns = weight.shape[1]
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(columns)
    left, q = weight.copy(), np.zeros_like(weight)
    order = list(np.argsort(-np.diag(gram), kind="stable"))
    for place, i in enumerate(order):
        rest = order[place:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        q[:, i] = np.clip(np.rint(left[:, i] / steps), -top, top)
        if mask is not None:
            q[:, i] *= mask[:, i]
        error = (left[:, i] - q[:, i] * steps) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return q


@pytest.mark.parametrize(("columns", "top"), [(9, 7), (140, 7), (140, 127)])
@pytest.mark.parametrize("masked", [False, True])
def test_integers_by_hand(columns: int, top: int, masked: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((300, columns)) @ rng.standard_normal((columns, columns)) * rng.random(columns)
    gram = x.T @ x
    weight = rng.standard_normal((6, columns))
    steps = np.abs(weight).max(1) / top * 0.8
    mask = rng.random(weight.shape) < 0.5 if masked else None
    wide = [torch.from_numpy(a)[None] for a in (weight, gram, steps)]
    found = gptq_integers("gptq", "fc", *wide, top, None if mask is None else torch.from_numpy(mask)[None])
    np.testing.assert_array_equal(found[0].numpy(), by_hand(weight, gram, steps, top, mask))


def correlated(count: int, width: int) -> Tensor:
    return torch.randn(count, width) @ (torch.randn(width, width) * torch.rand(width) ** 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(72, 48), nn.Linear(48, 10)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x.reshape(-1, 4, 3, 3))).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_stay_closer_than_rounded_and_integers_survive(bits: int, sequential: bool) -> None:
    model = Net().train()
    before = copy.deepcopy(model).eval()
    batches = [correlated(64, 36) for _ in range(5)]
    report: list[Rounded] = []
    assert gptq(model, batches, bits=bits, sequential=sequential, report=report) is model
    assert model.training
    assert [r.layer for r in report] == ["conv", "fc1", "fc2"]
    assert all(r.gptq <= r.nearest for r in report)
    assert sum(r.gptq for r in report[1:]) < 0.6 * sum(r.nearest for r in report[1:])
    assert "forward" not in vars(model.fc1)
    with torch.no_grad():
        x = torch.cat(batches)
        hidden = torch.relu(before.conv(x.reshape(-1, 4, 3, 3))).flatten(1)
        exact = before.fc1(hidden) - before.fc1.bias
        got = hidden @ model.fc1.weight.T
    if not sequential:
        relative = float((got - exact).double().square().sum() / exact.double().square().sum())
        assert relative == pytest.approx(report[1].gptq, rel=1e-3)
    top = 2 ** (bits - 1) - 1
    for name, kind in {"conv": Int8Conv2d, "fc1": Int8Linear, "fc2": Int8Linear}.items():
        layer: Any = model.get_submodule(name)
        q = layer.weight.detach() / layer.weight_scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        assert float((q - q.round()).abs().max()) < 1e-4
        assert float(q.abs().max()) <= top + 1e-4
        assert torch.equal(kind.from_float(layer).state_dict()["weight"].float(), q.round())
    assert not hasattr(model.unused, "weight_scale")
    assert set(model.state_dict()) == set(before.state_dict())


def test_layers_see_what_the_quantised_ones_before_them_make() -> None:
    model, batches = Net(), [correlated(64, 36)]
    reports: dict[bool, list[Rounded]] = {True: [], False: []}
    for sequential, report in reports.items():
        gptq(copy.deepcopy(model), batches, sequential=sequential, report=report)
    assert reports[True][0] == reports[False][0]
    assert reports[True][2] != reports[False][2]


def test_pruned_weights_stay_zero_and_the_others_compensate() -> None:
    model = prune(nn.Sequential(nn.Linear(64, 32)), pattern="2:4", sparsity=0.5)
    zeros = model[0].weight == 0
    batches = [correlated(256, 64)]
    report: list[Rounded] = []
    gptq(model, batches, report=report)
    assert torch.equal(model[0].weight * zeros, torch.zeros(32, 64))
    assert report[0].gptq < 0.7 * report[0].nearest
    x, expected = batches[0], model(batches[0])
    tautorch.convert(model, {"0": partial(SparseLinear.from_float, pattern="2:4")})
    assert int(model[0].state_dict()["values"].abs().max()) <= 7
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_the_chain_to_static_layers_and_to_qat() -> None:
    model, batches = Net(), [correlated(64, 36)]
    gptq(model, batches, bits=4, layers=["fc*"])
    weight = model.fc1.weight.detach().clone()
    student = prepare_qat(copy.deepcopy(model), bits=4, layers=["fc*"])
    assert torch.allclose(student.fc1.weight, weight, atol=1e-7)
    ranges = calibrate(model, batches, layers=["fc1"])["fc1"]
    make = partial(
        Int8Linear.from_float, quant="static", x_scale=ranges.scale, x_zero_point=ranges.zero_point
    )
    tautorch.convert(model, {"fc1": make})
    assert torch.allclose(model.fc1.dense_weight(), weight, atol=1e-7)


def test_a_layer_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x) * 3)

    model, report, x = Twice(), list[Rounded](), correlated(50, 6)
    w = model.fc.weight.detach().double()
    both = torch.cat([x, (model.fc(x) * 3).detach()]).double()
    gptq(model, [x], report=report)
    wrong = (both @ (model.fc.weight.detach().double() - w).T).square().sum() / (both @ w.T).square().sum()
    assert float(wrong) == pytest.approx(report[0].gptq, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be a whole number from 4 to 8, got 3"),
        ({"batches": []}, "at least one batch"),
        ({"layers": ["unused"]}, "calibration must reach layer 'unused'"),
        ({"layers": ["head"]}, "must name layers of the model, got 'head'"),
        ({"dampening": 0.0}, "dampening must be a positive number"),
        ({"batches": [torch.full((2, 36), torch.nan)]}, "got NaN or Inf at layer 'conv'"),
        ({"batches": [torch.ones(2, 36), torch.full((2, 36), torch.nan)]}, "got NaN or Inf at layer 'conv'"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = Net()
    state = copy.deepcopy(model.state_dict())
    arguments: dict[str, Any] = {"batches": [correlated(8, 36)]} | options
    with pytest.raises(ValueError, match=message):
        gptq(model, **arguments)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())
    assert not any("weight_scale" in m._buffers for m in model.modules())


def test_a_failure_on_the_way_puts_every_weight_back() -> None:
    class Breaks(Net):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Breaks.runs += 1
            return super().forward(x if Breaks.runs < 4 else x * torch.nan)

    model = Breaks()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="got NaN or Inf at layer 'fc2'"):
        gptq(model, [correlated(64, 36)])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_bad_dampening_is_refused_before_the_model_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match="gptq: dampening must be a positive number"):
        gptq(model, [torch.randn(8, 4)], dampening=0.0)
    assert not runs


def test_a_forward_of_the_instance_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    plain = model[2].forward
    model[2].forward = own = lambda x: 2 * plain(x)
    x = torch.randn(32, 8)
    expected = model(x).detach()
    gptq(model, [x], bits=8)
    assert model[2].forward is own and "forward" not in vars(model[0])
    assert float((model(x).detach() - expected).norm() / expected.norm()) < 0.05
