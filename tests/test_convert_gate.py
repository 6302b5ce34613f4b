"""The gate of `convert`: slower layers stay out, and measuring leaves the model as it was."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tautorch.convert import convert
from tautorch.convert_report import ConvertReport
from tautorch.nn import Int8Linear
from tautorch.quantize import calibrate

from .test_convert import Wrapped


class Waiting(nn.Linear):
    """A float layer that is slow, to be beaten; `only` restricts it to one batch size."""

    def __init__(self, *args: int, wait: float = 1e-3, only: int | None = None) -> None:
        super().__init__(*args)
        self.wait, self.only = wait, only

    def forward(self, x: Tensor) -> Tensor:
        if self.only in (None, x.shape[0]):
            time.sleep(self.wait)
        return F.linear(x, self.weight, self.bias)


def plain(layer: nn.Module) -> nn.Linear:
    """A fast copy of a `Waiting`."""
    assert isinstance(layer, nn.Linear)
    new = nn.Linear(layer.in_features, layer.out_features)
    new.load_state_dict(layer.state_dict())
    return new


def test_gate_keeps_the_layer_that_wins() -> None:
    model = nn.Sequential(Waiting(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    slow_before = model[1]
    report = ConvertReport()
    plan = {"0": plain, "1": lambda layer: Wrapped(layer, 1e-3), "2": lambda layer: layer}
    convert(model, plan, [torch.randn(1, 8), torch.randn(5, 8)], gate=True, seconds=0.05, report=report)
    assert type(model[0]) is nn.Linear
    assert model[1] is slow_before
    fast, slow, own = report.layers
    assert fast.replaced and fast.old_class == "Waiting" and fast.new_class == "Linear"
    assert fast.worst_ratio > 2 and fast.error == 0
    assert [t.shape for t in fast.times] == [(1, 8), (5, 8)]
    assert all(t.before_s > 1e-3 > t.after_s for t in fast.times)
    assert not slow.replaced and slow.reason.startswith("kept: Wrapped is slower at ")
    assert slow.bytes_after == slow.bytes_before and slow.worst_ratio < 0.5
    assert not own.replaced and "returned the layer itself" in own.reason
    assert [t.shape for t in report.model] == [(1, 8), (5, 8)]
    assert all(t.ratio > 2 for t in report.model)
    assert report.gated and report.threads == torch.get_num_threads()
    assert report.model_parameters == 3 * 72
    assert report.converted_share == pytest.approx(1 / 3)
    assert [r.name for r in report.replaced] == ["0"]
    assert [r.name for r in report.kept] == ["1", "2"]


def test_gate_needs_a_win_at_every_shape() -> None:
    model = nn.Sequential(Waiting(8, 8, only=64))
    report = ConvertReport()
    batches = [torch.randn(1, 8), torch.randn(64, 8)]
    convert(
        model, {"0": lambda la: Wrapped(plain(la), 2e-4)}, batches, gate=True, seconds=0.05, report=report
    )
    assert type(model[0]) is Waiting
    assert "slower at 1x8" in report.layers[0].reason
    assert [t.ratio > 1 for t in report.layers[0].times] == [False, True]


def test_min_speedup() -> None:
    report = ConvertReport()
    model = nn.Sequential(Waiting(8, 8))
    plan = {"0": lambda la: Wrapped(plain(la), 5e-4)}
    convert(model, plan, torch.randn(1, 8), gate=True, min_speedup=50.0, seconds=0.05, report=report)
    assert type(model[0]) is Waiting
    assert "(needs 50x)" in report.layers[0].reason


def test_gate_keeps_what_it_could_not_measure() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = ConvertReport()
    model = Unused()
    convert(model, {"unused": Int8Linear.from_float}, torch.randn(1, 4), gate=True, report=report)
    assert isinstance(model.unused, nn.Linear)
    assert "never ran" in report.layers[0].reason


def test_gate_backs_out_what_slows_the_whole_model() -> None:
    """A replacement that is fast alone and makes the model wait elsewhere; the one that pays stays."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = Waiting(8, 8, wait=2e-3), Waiting(8, 8, wait=5e-4)

        def forward(self, x: Tensor) -> Tensor:
            if type(self.bad) is nn.Linear:
                time.sleep(6e-3)
            return self.bad(self.good(x))

    model = Model()
    report = ConvertReport()
    convert(model, {"good": plain, "bad": plain}, torch.randn(2, 8), gate=True, seconds=0.05, report=report)
    assert type(model.good) is nn.Linear
    assert type(model.bad) is Waiting
    assert "backed out" in report.layers[1].reason and not report.layers[1].replaced
    assert report.model[0].ratio > 1


def test_timing_uses_the_captured_inputs() -> None:
    """Layers get the strides, dtypes and keyword arguments of the real calls, in copies of their own."""
    seen: list[tuple[Any, ...]] = []

    class Spy(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            seen.append((tuple(x.shape), x.stride(), x.dtype, scale, x.data_ptr()))
            return self.layer(x, scale=scale)

    class Scaling(nn.Module):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x * scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Scaling()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x.t(), scale=2.0)
            return y + self.a(x[:1].expand(4, 4), scale=3.0) + self.a(x.t(), scale=2.0)

    model = Model()
    x = torch.randn(4, 4, dtype=torch.float64)
    report = ConvertReport()
    convert(model, {"a": Spy}, {"x": x}, gate=True, min_speedup=0.0, seconds=0.01, report=report)
    calls = {entry[:4] for entry in seen}
    assert calls == {((4, 4), (1, 4), torch.float64, 2.0), ((4, 4), (0, 1), torch.float64, 3.0)}
    assert [t.stride for t in report.layers[0].times] == [(1, 4), (0, 1)]
    assert report.layers[0].times[0].dtype == "float64"


class Remembers(nn.Module):
    """A cache that grows with each run, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(1, 0, 64), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.cache = torch.cat([self.cache, self.layer(x)], 1)
        return self.cache.mean(1)


@pytest.mark.parametrize("gate", [False, True])
def test_state_in_buffers_is_that_of_before(gate: bool) -> None:
    model, x = Remembers().eval(), torch.randn(1, 1, 64)
    model(x)
    cache, steps = model.cache, model.steps
    expected = cache.clone()
    calibrate(model, [torch.randn(1, 1, 64)] * 3)
    assert model.cache is cache and model.steps is steps and int(steps) == 1
    convert(
        model, {"layer": Int8Linear.from_float}, example_inputs=x, gate=gate, min_speedup=0.01, seconds=0.01
    )
    assert isinstance(model.layer, Int8Linear)
    assert model.cache is cache and model.steps is steps and int(steps) == 1
    assert torch.equal(cache, expected)


class Grows(nn.Module):
    """A table that is made anew for longer inputs; an attribute says how long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.grow(4)

    def grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("table", torch.linspace(0, 1, length)[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self.grow(x.shape[1])
        return self.layer(x) * self.table[: x.shape[1]]


def test_a_table_that_a_run_made_longer_fits_afterwards() -> None:
    model, x = Grows().eval(), torch.randn(2, 9, 16)
    expected = copy.deepcopy(model)(x)
    calibrate(model, [x])
    assert torch.equal(model(x), expected)
    model = Grows().eval()
    convert(model, {"layer": Int8Linear.from_float}, example_inputs=x)
    assert model.length == 4 and model(x).shape == x.shape


def test_buffers_without_values_or_of_many_bytes_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("few", torch.zeros(2))
            self.register_buffer("many", torch.zeros(100))

        def forward(self, x: Tensor) -> Tensor:
            self.few += 1
            self.many += 1
            return x

    monkeypatch.setattr("tautorch._batches._COPIED_BYTES", 64)
    model = nn.Sequential(nn.Linear(8, 8), Counts(), nn.LazyBatchNorm1d()).eval()
    assert list(calibrate(model, [torch.randn(4, 8)])) == ["0"]
    assert float(model[1].few[0]) == 0.0 and float(model[1].many[0]) == 1.0
