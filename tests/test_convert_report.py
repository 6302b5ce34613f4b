"""What `convert` reports: errors, the limit on them, and what could not be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.compress import Report
from tautorch.convert import convert
from tautorch.convert_report import ConvertReport
from tautorch.nn import Int8Linear

from .test_convert import Wrapped, mlp


def test_report_prints_and_turns_into_json() -> None:
    model = mlp()
    report = ConvertReport()
    batches = [torch.randn(1, 16), torch.randn(3, 16)]
    plan = {"0": Int8Linear.from_float, "2": lambda layer: layer}
    convert(model, plan, batches, gate=True, min_speedup=0.0, seconds=0.01, report=report)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["name"] == "0"
    assert data["layers"][0]["kernel"] == report.layers[0].kernel != "torch"
    assert data["layers"][0]["worst_ratio"] == report.layers[0].worst_ratio
    assert data["layers"][1]["worst_ratio"] is None
    assert data["converted_share"] == pytest.approx(544 / 808)
    assert 0 < data["model_error"] < 0.05
    assert data["layers"][0]["bytes_after"] < data["layers"][0]["bytes_before"]
    text = str(report)
    assert "Int8Linear" in text and "1 of 2 layers replaced" in text and "model at 1x16" in text


def outlier() -> tuple[nn.Sequential, Tensor]:
    """An input channel so large that int8 activations of one scale a row lose all the others."""
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    x[:, 0] = 1e4
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    return model, x


def test_report_prints_errors() -> None:
    model, x = outlier()
    report = ConvertReport()
    convert(model, {"0": Int8Linear.from_float}, x, report=report)
    error, whole = report.layers[0].error, report.model_error
    assert error is not None and error > 0.5 and whole is not None
    head, row, *rest = str(report).splitlines()
    assert head.split() == ["layer", "was", "runs", "bytes", "error", "why"]
    assert f"  {100 * error:.3g} %  replaced" in row
    assert f"model error {100 * whole:.3g} %" in rest


@pytest.mark.parametrize("gate", [False, True])
def test_a_layer_above_the_error_allowed_stays(gate: bool) -> None:
    model, x = outlier()
    kept = model[0]
    report = ConvertReport()
    plan = {"0": Int8Linear.from_float, "2": Int8Linear.from_float}
    convert(model, plan, x, gate, max_error=0.05, min_speedup=0.0, seconds=0.005, report=report)
    assert model[0] is kept and isinstance(model[2], Int8Linear)
    first, second = report.layers
    assert first.error is not None and second.error is not None and second.error < 0.05
    assert first.reason == f"kept: Int8Linear is off by {100 * first.error:.3g} % (max_error is 5 %)"
    assert report.model_error is not None and report.model_error < 0.05
    assert first.kernel == "torch" and first.bytes_after == first.bytes_before and not first.times


def test_a_layer_whose_error_is_not_known_stays_under_a_limit() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for limit, kind in ((None, Int8Linear), (1.0, nn.Linear)):
        model = Half()
        plan = {"used": Int8Linear.from_float, "unused": Int8Linear.from_float}
        convert(model, plan, torch.randn(2, 16), max_error=limit)
        assert isinstance(model.used, Int8Linear) and isinstance(model.unused, kind)


@pytest.mark.parametrize(
    ("limit", "inputs", "match"),
    [
        (-0.1, torch.ones(1, 16), "max_error must be at least 0, got -0.1"),
        (float("nan"), torch.ones(1, 16), "max_error must be at least 0, got nan"),
        (0.1, None, "max_error must have example_inputs"),
    ],
)
def test_limits_that_make_no_sense(limit: float, inputs: Tensor | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        convert(mlp(), {"0": Int8Linear.from_float}, inputs, max_error=limit)


def test_a_report_of_another_kind_changes_nothing() -> None:
    model, report = mlp(), Report("of compile_layers")
    with pytest.raises(TypeError, match="convert: report must be a ConvertReport, got Report"):
        convert(model, {"0": Int8Linear.from_float}, report=report)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear


class Wraps(nn.Module):
    """A model whose output is what `wrap` makes of a layer's."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(16, 8), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.fc(x))


def test_the_error_of_an_object_is_that_of_its_tensors() -> None:
    x, errors = torch.randn(4, 16), []
    for wrap in (lambda y: y, lambda y: SimpleNamespace(logits=y, loss=None)):
        torch.manual_seed(3)
        report = ConvertReport()
        convert(Wraps(wrap), {"fc": Int8Linear.from_float}, x, report=report)
        assert report.uncompared == ""
        errors.append(report.model_error)
    assert errors[0] == errors[1] != 0


def test_an_object_with_other_tensors_is_refused() -> None:
    class Twice(Wrapped):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(y=self.layer(x).y.double())

    model = nn.Sequential(Wraps(lambda y: SimpleNamespace(y=y)))
    with pytest.raises(ValueError, match=r"'0': Twice .*must return torch.float32 .*, got torch.float64"):
        convert(model, {"0": Twice}, torch.randn(4, 16))


@pytest.mark.parametrize("wrap", [lambda y: y.argmax(-1), lambda y: float(y.sum()), lambda y: y[:0]])
def test_the_report_says_that_nothing_was_compared(wrap: Any) -> None:
    report = ConvertReport()
    convert(Wraps(wrap), {"fc": Int8Linear.from_float}, torch.randn(4, 16), report=report)
    assert report.model_error is None
    assert "model error unknown: its output on the example inputs holds no float tensor" in str(report)
    report = ConvertReport()
    convert(Wraps(wrap), {"fc": Int8Linear.from_float}, report=report)
    assert "unknown" not in str(report)
