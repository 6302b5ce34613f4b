"""A model that was run for its statistics is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch import convert, factorize, fuse, prune, quantize, students
from tautorch._batches import left_as_it_is, own_copy, squared_change
from tautorch.nn import Int8Linear


class Counting(nn.Module):
    """Counts its calls in place, and keeps a running mean under a new tensor each time."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        # By more than rounding: a run that finds another count gives another output.
        return x * (1 + self.calls)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(32), nn.Linear(32, 64), Counting(), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)
    )


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(batch).square().mean()
    return found


def batches() -> list[Tensor]:
    return [torch.randn(16, 32) for _ in range(3)]


RUNS: dict[str, Callable[[nn.Module], Any]] = {
    "gradient": lambda m: prune.prune(m, "gradient", calibration=batches(), loss=loss),
    "activation": lambda m: prune.prune(m, "activation", calibration=batches()),
    "speedup": lambda m: factorize.factorize(
        m, speedup=1e-3, calibration=batches(), layers=["4"], compiled=lambda pair: pair
    ),
    "smooth": lambda m: quantize.smooth(m, batches()),
    "gptq": lambda m: quantize.gptq(m, batches()),
    "cost": lambda m: students.cost(m, batches()[0]),
}


@pytest.mark.parametrize("run", list(RUNS.values()), ids=list(RUNS))
def test_buffers_are_put_back(run: Callable[[nn.Module], Any]) -> None:
    model = net()
    run(model)
    counting = next(module for module in model.modules() if isinstance(module, Counting))
    assert float(counting.calls) == 0.0 and float(counting.mean) == 0.0


class Shifted(nn.Sequential):
    """Changes the batch it is given in place, as normalising code does."""

    def forward(self, input: Tensor) -> Tensor:
        input -= 3.0
        return super().forward(input)


IN_PLACE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "gptq": quantize.gptq,
    "sparsegpt": lambda m, x: prune.prune(m, "sparsegpt", calibration=x),
    "gradient": lambda m, x: prune.prune(m, "gradient", calibration=x, loss=loss),
    "refit": lambda m, x: prune.prune(m, "activation", calibration=x, refit=3),
    "smooth": lambda m, x: quantize.smooth(m, x, explicit=False),
    "sensitivity": quantize.sensitivity,
    "convert": lambda m, x: convert(m, {"0": Int8Linear.from_float}, example_inputs=x, max_error=0.05),
    "fuse": lambda m, x: fuse(m, example_inputs=x[0]),
    "cost": lambda m, x: students.cost(m, x[0]),
}


@pytest.mark.parametrize("run", list(IN_PLACE.values()), ids=list(IN_PLACE))
def test_a_model_that_changes_its_input_is_run_on_copies(run: Callable[[nn.Module, Any], Any]) -> None:
    torch.manual_seed(0)
    model = Shifted(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = [torch.randn(32, 16) + 3 for _ in range(2)]
    plain, shifted = nn.Sequential(*copy.deepcopy(model)).eval(), [item - 3.0 for item in x]
    before = [item.clone() for item in x]
    run(model, x)
    run(plain, shifted)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_of_a_batch_keep_what_is_one_tensor_and_how_it_lies() -> None:
    x, wide = torch.randn(3, 4), torch.randn(1, 4).expand(3, 4)
    query, rest = own_copy((x, {"key": x, "wide": wide, "flag": True}))
    assert query is rest["key"] and query is not x
    assert torch.equal(query, x) and torch.equal(rest["wide"], wide) and rest["flag"] is True
    assert rest["wide"].stride() == wide.stride()


@pytest.mark.parametrize("fails", [False, True])
def test_pruned_channels_leave_counters(fails: bool) -> None:
    pytest.importorskip("torch_pruning")
    model = net()
    cut = partial(prune.prune_channels, model, batches()[0], 0.5, round_to=4)
    if fails:
        with pytest.raises(ValueError, match="at least one channel must be removable"):
            cut(protect=["1", "4", "5"])
    else:
        cut()
        assert model[4].out_features == 32
    assert float(model[2].calls) == 0.0


def test_running_statistics_are_put_back() -> None:
    model = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with left_as_it_is(model):
        model.train()(torch.randn(8, 3) + 5)
        assert not torch.equal(model.running_mean, before["running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sensitivity_scan_may_estimate_batch_norms_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(16, 4)

    def evaluate(model: nn.Module) -> float:
        model.train()
        model(x)
        model.eval()
        return float(model(x).mean())

    prune.sensitivity(model, evaluate)
    quantize.sensitivity(model, [x], metric=evaluate)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_must_stay_what_it_was() -> None:
    inf, nan = float("inf"), float("nan")
    before = torch.tensor([1.0, -inf, 2.0, nan])
    assert squared_change(before, before.clone()) == (0.0, 5.0)
    for other in (nan, inf, 0.0):
        assert squared_change(before, torch.tensor([1.0, other, 2.0, nan])) == (inf, 5.0)
    assert squared_change(before, torch.tensor([1.0, -inf, inf, nan])) == (inf, 5.0)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.ones(3, dtype=torch.complex32),
        torch.full((1,), float("nan")).expand(4),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["complex32", "NaN, expanded", "nested"],
)
def test_buffers_of_any_kind_are_left(buffer: Tensor) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("kept", buffer)
    with left_as_it_is(model):
        model(torch.ones(1, 3))
    assert model.kept is buffer
