"""The report of what each layer's quantisation costs."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tautorch.quantize import quantize_weight, sensitivity


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16)
        self.last, self.unused = nn.Linear(16, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        # In place: what a layer put out is gone afterwards.
        x = torch.relu_(self.second(torch.relu_(self.first(x))))
        return {"logits": self.last(x), "best": x.argmax(-1)}


def decibels(exact: np.ndarray, got: np.ndarray) -> float:
    return 10 * math.log10((exact**2).sum() / ((got - exact) ** 2).sum())


def test_sqnr_by_hand() -> None:
    model, batches = Net(), [torch.randn(9, 12), torch.randn(5, 12)]
    state = copy.deepcopy(model.state_dict())
    found = sensitivity(model, batches, bits=4, quant="weight_only")
    costs = {cost.layer: cost for cost in found.layers}
    assert set(costs) == {"first", "second", "last"}
    x = torch.cat(batches).double().numpy()
    w = {n: model.get_submodule(n).weight.detach() for n in costs}
    b = {n: model.get_submodule(n).bias.detach().double().numpy() for n in costs}
    for name, cost in costs.items():
        q, scale = quantize_weight(w[name], search=True, bits=4)
        outputs = []
        for changed in (False, True):
            inner: dict[str, np.ndarray] = {}
            y = x
            for layer in ("first", "second", "last"):
                weight = (q * scale[:, None]) if changed and layer == name else w[layer]
                y = inner[layer] = y @ weight.double().numpy().T + b[layer]
                y = np.maximum(y, 0) if layer != "last" else y
            outputs.append(inner)
        assert cost.output_sqnr == pytest.approx(decibels(outputs[0]["last"], outputs[1]["last"]), abs=1e-3)
        assert cost.layer_sqnr == pytest.approx(decibels(outputs[0][name], outputs[1][name]), abs=1e-3)
        assert cost.parameters == w[name].numel()
        assert cost.metric_drop is None
    order = [cost.output_sqnr for cost in found.layers]
    assert order == sorted(order)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(type(m) in (Net, nn.Linear) and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("quant", ["dynamic", "static"])
def test_the_bad_layer_heads_the_list_and_the_metric_rules(quant: str) -> None:
    model, batches = Net(), [torch.randn(64, 12)]
    with torch.no_grad():
        model.second.weight[:, 3] *= 300  # one input takes the whole range of every output
        model.first.weight[3] /= 300
        model.first.bias[3] /= 300
    found = sensitivity(model, batches, quant=quant)
    assert found.layers[0].layer == "second"
    assert found.layers[0].output_sqnr < found.layers[1].output_sqnr - 10

    def metric(m: Any) -> float:
        quantised = [
            n for n in ("first", "second", "last") if hasattr(m.get_submodule(n), "parametrizations")
        ]
        return {"first": 0.25, "second": 0.75, "last": 0.5}[quantised[0]] if quantised else 1.0

    found = sensitivity(model, batches, quant=quant, metric=metric)
    assert [(cost.layer, cost.metric_drop) for cost in found.layers] == [
        ("first", 0.75),
        ("last", 0.5),
        ("second", 0.25),
    ]
    assert found.metric == 1.0
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "output", "SQNR", "layer", "SQNR", "parameters", "metric", "drop"]
    assert lines[1].split()[0] == "first"
    assert len(lines) == 4


def test_masked_logits_in_an_object_count_where_they_are_finite() -> None:
    class Policy(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.head, self.wrap = nn.Linear(16, 8), wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.head(x).masked_fill(x[:, :8] < 0, float("-inf")))

    x = torch.randn(64, 16)
    plain = Policy(lambda y: y[y.isfinite()])
    held = Policy(lambda y: SimpleNamespace(logits=y))
    held.load_state_dict(plain.state_dict())
    (wanted,), (found,) = sensitivity(plain.eval(), [x]).layers, sensitivity(held.eval(), [x]).layers
    assert found.output_sqnr == pytest.approx(wanted.output_sqnr) and 20 < found.output_sqnr < 80


def test_a_layer_that_is_exact_costs_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7.0, -3.0, 1.0], [1.0, 0.0, 7.0]]))
    found = sensitivity(model, [torch.randn(4, 3)], bits=4, quant="weight_only")
    assert found.layers[0].output_sqnr == math.inf


def test_parameters_and_their_order_stay() -> None:
    model = Net()
    before = list(model.named_parameters())
    sensitivity(model, [torch.randn(4, 12)])
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))


def test_the_metric_sees_the_model_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[3].eval()
    state, x = copy.deepcopy(model.state_dict()), torch.randn(32, 12)
    exact = copy.deepcopy(model).eval()(x).detach()
    seen: list[Tensor] = []

    def metric(m: nn.Module) -> float:
        seen.append(m(x))
        return -float(seen[-1].square().mean())

    found = sensitivity(model, [x], metric=metric)
    assert torch.equal(seen[0], exact) and len(seen) == 3
    assert not any(y.requires_grad for y in seen)
    assert found.metric == -float(exact.square().mean())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, False]


def test_nan_is_the_dearest() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    metrics = iter([1.0, 0.9, math.nan, 0.5, 0.7])
    found = sensitivity(model, [torch.randn(3, 4)], metric=lambda _: next(metrics))
    assert [cost.layer for cost in found.layers] == ["1", "2", "3", "0"]


def test_a_metric_that_fails_leaves_the_model() -> None:
    model = Net()

    def metric(m: nn.Module) -> float:
        if hasattr(m.first, "parametrizations"):
            raise RuntimeError("no data")
        return 1.0

    with pytest.raises(RuntimeError, match="no data"):
        sensitivity(model, [torch.randn(4, 12)], metric=metric)
    assert type(model.first) is nn.Linear
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "sensitivity: bits must be a whole number from 4 to 8, got 2"),
        ({"quant": "w8"}, "sensitivity: quant must be one of dynamic"),
        ({"layers": ["unused"]}, "calibration must reach layer 'unused'"),
        ({"batches": []}, "at least one batch"),
        ({"layers": ["head"]}, "must name layers of the model, got 'head'"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"batches": [torch.randn(2, 12)]} | options
    with pytest.raises(ValueError, match=message):
        sensitivity(Net(), **arguments)


def test_a_layer_whose_quantisation_breaks_the_output_is_the_dearest() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False)
            with torch.no_grad():
                self.b.weight.fill_(1e-3)
                self.b.weight[:, 0] = 1.0  # beside which the others round to 0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).square() * torch.tensor([0.0] + [1.0] * 7)).log()

    (first, *_) = sensitivity(Log().eval(), [torch.randn(16, 8)], bits=4, quant="weight_only").layers
    assert first.layer == "b" and first.output_sqnr == -float("inf")
