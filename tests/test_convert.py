"""`convert`: what it refuses, what it replaces, and that its gate keeps slower layers out."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.compress import compile_layers
from tautorch.convert import convert
from tautorch.convert_report import ConvertReport
from tautorch.factorize import FactorizedLinear
from tautorch.nn import MODULES, Int8Linear, LowRankLinear
from tautorch.quantize import calibrate


class Wrapped(nn.Module):
    """A replacement that computes the same; `wait` seconds slower."""

    def __init__(self, layer: nn.Module, wait: float = 0.0) -> None:
        super().__init__()
        self.layer, self.wait = layer, wait

    def forward(self, x: Tensor) -> Tensor:
        if self.wait:
            time.sleep(self.wait)
        return self.layer(x)


def snapshot(model: nn.Module) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    return modules, copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, before: tuple[list[tuple[str, int]], dict[str, Tensor]]) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    assert list(state) == list(before[1])
    assert all(torch.equal(state[k], before[1][k]) for k in state)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_replaces_in_place_and_returns_the_model() -> None:
    model = mlp().eval()
    x = torch.randn(4, 16)
    expected, last = model(x), model[2]
    assert convert(model, {"0": Int8Linear.from_float}) is model
    assert isinstance(model[0], Int8Linear)
    assert model[2] is last
    assert 0 < (model(x) - expected).norm() / expected.norm() < 0.05


def test_nested_names_and_module_lists() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([mlp(), mlp()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) + self.layers[1](x)

    model = Block()
    convert(model, {"layers.1.0": Int8Linear.from_float}, torch.randn(2, 16))
    assert isinstance(model.layers[1][0], Int8Linear)
    assert isinstance(model.layers[0][0], nn.Linear)


@pytest.mark.parametrize("training", [False, True])
def test_training_flags_are_kept(training: bool) -> None:
    model = mlp().train(training)
    model[1].training = not training
    convert(model, {"0": Int8Linear.from_float}, torch.randn(2, 16), gate=True, min_speedup=0.0, seconds=0.01)
    assert isinstance(model[0], Int8Linear)
    assert [m.training for m in model] == [training, not training, training]


def test_random_state_is_kept() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    state = torch.get_rng_state()
    convert(model, {"1": lambda layer: nn.Linear(4, 4)}, torch.randn(2, 4, generator=torch.Generator()))
    assert torch.equal(state, torch.get_rng_state())


def broken(layer: nn.Module) -> nn.Module:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (broken, "its factory failed: RuntimeError: no such kernel"),
        (lambda layer: 3, "must return an nn.Module, got int"),
        (lambda layer: nn.Linear(5, 8), "failed on a torch.float32 input"),
        (lambda layer: nn.Linear(32, 9), r"must return torch.float32 \[4, 8\], got torch.float32 \[4, 9\]"),
        (lambda layer: Wrapped(nn.Linear(32, 8)).half(), "failed on a torch.float32 input"),
        (lambda layer: nn.Sequential(layer, nn.Threshold(100.0, float("nan"))), "non-finite"),
    ],
)
@pytest.mark.parametrize("gate", [False, True])
def test_nothing_changes_if_any_entry_fails(factory: Any, reason: str, gate: bool) -> None:
    model = mlp()
    before = snapshot(model)
    report = ConvertReport()
    with pytest.raises(ValueError, match=reason):
        convert(model, {"0": Wrapped, "2": factory}, torch.randn(4, 16), gate, report=report)
    assert_same(model, before)
    assert report == ConvertReport()


def test_nothing_changes_if_only_the_whole_model_fails() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self.a, "in_features"):
                raise RuntimeError("where is my layer")
            return self.a(x)

    model = Picky()
    layer = model.a
    with pytest.raises(ValueError, match=r"converted model failed on the example inputs.*where is my layer"):
        convert(model, {"a": Wrapped}, torch.randn(2, 4))
    assert model.a is layer


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"'x': no such layer.*'0': the plan|'x'.*'y'"):
        convert(mlp(), {"x": Wrapped, "y": Wrapped})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torch.compile, "_orig_mod.0"),
        (torch.compile, "0"),
        (lambda m: m.compile() or m, "0"),
        (lambda m: nn.Sequential(torch.compile(m)), "0._orig_mod.2"),
    ],
)
def test_a_compiled_model_is_refused(make: Any, name: str) -> None:
    model = make(mlp())
    with pytest.raises(ValueError, match=r"it is compiled; convert before torch.compile, or pass model"):
        convert(model, {name: Int8Linear.from_float}, torch.randn(2, 16))
    model = nn.Sequential(torch.compile(mlp(), backend="eager"), nn.Linear(8, 8))
    convert(model, {"1": Int8Linear.from_float}, torch.randn(2, 16))
    assert type(model[1]) is Int8Linear


def test_overlapping_entries_are_refused() -> None:
    model = nn.Sequential(mlp())
    with pytest.raises(ValueError, match=r"'0.2': it lies inside '0'"):
        convert(model, {"0": Wrapped, "0.2": Wrapped})


def test_close_names_are_suggested() -> None:
    model = nn.ModuleDict({"encoder": mlp()})
    with pytest.raises(ValueError, match=r"close: encoder.0"):
        convert(model, {"encoder_0": Wrapped})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3, {}), TypeError, "model must be an nn.Module"),
        ((mlp(), [("0", Wrapped)]), TypeError, "plan must be a dict"),
        ((mlp(), {"0": nn.Linear(16, 32)}), TypeError, "lambda layer: module"),
        ((mlp(), {"0": "Int8Linear"}), TypeError, "plan must map names to functions"),
        ((mlp(), {"0": Wrapped}, 3.0), TypeError, "example_inputs must be a batch"),
        ((mlp(), {"0": Wrapped}, []), ValueError, "at least one batch"),
        ((mlp(), {"0": Wrapped}, [[1]]), TypeError, "a batch must be a tensor"),
        ((mlp(), {"0": Wrapped}, None, True), ValueError, "gate=True must have example_inputs"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"convert: .*{match}"):
        convert(*arguments)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.each)(self.first(x))


def test_a_layer_inside_vmap_is_refused_by_name() -> None:
    model, x, int8 = Mapped().eval(), torch.randn(4, 16), Int8Linear.from_float
    with pytest.raises(ValueError, match=r"convert: layer 'each' must not run inside torch.vmap"):
        convert(model, {"first": int8, "each": int8}, x)
    with pytest.raises(ValueError, match=r"calibrate: layer 'each' must not run inside torch.vmap"):
        calibrate(model, [x])
    assert type(model.first) is nn.Linear
    compile_layers(model, [x], [x], layers=["first"], gate=False)
    assert type(model.first) is Int8Linear and type(model.each) is nn.Linear


@pytest.mark.parametrize("name", ["seconds", "min_speedup"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_that_make_no_sense(name: str, value: float) -> None:
    options: Any = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {value}"):
        convert(mlp(), {}, torch.ones(1, 16), gate=True, **options)


@pytest.mark.parametrize("kind", sorted(MODULES))
@pytest.mark.parametrize("gate", [False, True])
def test_every_compiled_layer(kind: str, gate: bool) -> None:
    """Checked on real inputs of two sizes; the report names the kernel and the bytes of what now runs."""
    linear = kind.endswith("Linear")
    layer: nn.Module = nn.Linear(40, 64) if linear else nn.Conv2d(5, 64, 3, padding=1)
    model = nn.Sequential(nn.Identity(), layer).eval()
    batches = [torch.randn(n, 40) if linear else torch.randn(n, 5, 6, 6) for n in (1, 9)]
    expected = [model(x) for x in batches]
    options = {"rank": 40 if linear else 45} if "LowRank" in kind else {}  # full
    report = ConvertReport()
    plan = {"1": lambda la: MODULES[kind].from_float(la, **options)}
    convert(model, plan, batches, gate, min_speedup=0.0, seconds=0.01, report=report)
    record = report.layers[0]
    assert type(model[1]) is MODULES[kind]
    assert record.new_class == kind and record.kernel == model[1].kernel() != "torch"
    assert record.bytes_after >= model[1].packed_bytes() > 0
    for x, y in zip(batches, expected, strict=True):
        assert (model(x) - y).norm() / y.norm() < 0.03
    assert record.error is not None and record.error < 0.03
    assert len(record.times) == (2 if gate else 0)


def test_a_factorised_pair_becomes_one_layer() -> None:
    model = nn.Sequential(FactorizedLinear(nn.Linear(40, 6, bias=False), nn.Linear(6, 30)), nn.ReLU()).eval()
    x = torch.randn(4, 40)
    expected = model(x)
    convert(model, {"0": lambda pair: LowRankLinear.from_float(pair, weight_dtype=torch.float32)}, x)
    assert isinstance(model[0], LowRankLinear)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_chain_of_codes() -> None:
    """int8 output is checked by what it stands for; a layer that does not take it, or a gate, is refused."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.rand(20, 16)
    with torch.no_grad():
        top, expected = float(model[0](x).relu().max()), model(x)
    codes = {"out_scale": top / 255, "out_zero_point": -128}
    plan: dict[str, Any] = {
        "0": lambda la: Int8Linear.from_float(
            la, quant="static", x_scale=1 / 255, x_zero_point=-128, activation="relu", **codes
        ),
        "2": lambda la: Int8Linear.from_float(la, quant="static", x_scale=top / 255, x_zero_point=-128),
    }
    model[1], model[0] = nn.Identity(), nn.Sequential(model[0], model[1])
    before = snapshot(model)

    def first(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Sequential)
        return plan["0"](layer[0])

    for entries, gate, match in (
        ({"0": first}, False, "the converted model failed on the example inputs"),
        ({"0": first, "2": plan["2"]}, True, r"'0': Int8Linear gives int8 codes \(out_scale\)"),
        ({"0": lambda la: Int8Linear.from_float(la[0], out_scale=1e30)}, False, "failed on the example"),
        ({"2": lambda la: Int8Linear.from_float(la, out_scale=0.1)}, False, "must return torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            convert(model, entries, x, gate)
        assert snapshot(model)[0] == before[0]
    report = ConvertReport()
    y = convert(model, {"0": first, "2": plan["2"]}, x, report=report)(x)
    assert float((y - expected).norm() / expected.norm()) < 0.02
    assert all(0 < error < 0.02 for layer in report.layers if (error := layer.error) is not None)
    assert len([layer for layer in report.layers if layer.error is not None]) == 2
