"""The scan prunes one layer at a time and leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tautorch.prune import prune, sensitivity

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def scorer(model: nn.Module) -> Any:
    dense = copy.deepcopy(model)
    calls = []

    def evaluate(current: nn.Module) -> float:
        assert not current.training
        assert not torch.is_grad_enabled()
        calls.append(1)
        return -float((current(X) - dense(X)).square().mean())

    return evaluate, calls


@pytest.mark.parametrize("importance", ["magnitude", "activation", "sparsegpt"])
def test_scores_are_those_of_each_layer_pruned_alone(importance: str) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    evaluate, calls = scorer(model)
    found = sensitivity(model, evaluate, "4x1", [0.5, 0.75], importance=importance, calibration=[X])
    assert len(calls) == 5
    assert found.score == 0.0
    for layer in found.layers:
        for share, score in layer.scores.items():
            twin = copy.deepcopy(model)
            prune(twin, importance, "4x1", share, layers=[layer.name], calibration=[X])
            with torch.no_grad():
                assert score == pytest.approx(evaluate(twin.eval()), rel=1e-6)
    worst = [layer.scores[0.75] for layer in found.layers]
    assert worst == sorted(worst)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_table_and_the_suggestion() -> None:
    model = net()
    scores = iter([1.0, 0.99, 0.9, 0.95, 0.2])
    found = sensitivity(model, lambda _: next(scores), sparsities=[0.5, 0.9])
    assert [layer.name for layer in found.layers] == ["2", "0"]
    assert found.suggest(0.06) == {"2": 0.5, "0": 0.5}
    assert found.suggest(0.11) == {"2": 0.5, "0": 0.9}
    assert found.suggest(0.0) == {"2": 0.0, "0": 0.0}
    lines = [line.split() for line in str(found).splitlines() if "+" in line]
    assert lines == [["2", "64", "+0.05", "+0.8"], ["0", "128", "+0.01", "+0.1"]]


def test_a_pattern_of_n_in_m_has_its_own_sparsity() -> None:
    found = sensitivity(net(), lambda _: 1.0, "2:4")
    assert list(found.layers[0].scores) == [0.5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsities": [1.0]}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsities": []}, ValueError, "one or more numbers"),
        ({"sparsities": [0.0]}, ValueError, "one or more numbers"),
        ({"ranking": "global"}, ValueError, "one layer at a time"),
        ({"layers": ["9"]}, ValueError, "must name layers"),
        ({"evaluate": lambda _: float("nan")}, ValueError, "finite score of the whole model"),
        ({"evaluate": lambda _: None}, TypeError, "must return a number, got NoneType"),
        ({"evaluate": 3}, TypeError, "evaluate must be a callable"),
        ({"pattern": "2:4", "sparsities": [0.7]}, ValueError, "sparsity must be 0.5"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sensitivity(net(), **({"evaluate": lambda _: 1.0} | options))


def test_an_evaluation_that_fails_leaves_the_model() -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    count = 0

    def evaluate(_: nn.Module) -> float:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("out of data")
        return 1.0

    with pytest.raises(RuntimeError, match="out of data"):
        sensitivity(model, evaluate)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
