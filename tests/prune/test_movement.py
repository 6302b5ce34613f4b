"""Movement scores against sums made by hand, and a schedule that prunes by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.prune import Movement, Schedule, prune


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        (model(x) - 1.0).square().sum().backward()
        optimizer.step()


def test_scores_are_the_sum_of_gradient_times_weight(rng: np.random.Generator) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    movement = Movement(model, optimizer)
    weight = model[0].weight.detach().numpy().copy()
    expected = np.zeros_like(weight)
    inputs = [rng.standard_normal((5, 4)) for _ in range(3)]
    for x in inputs:
        gradient = 2 * (x @ weight.T - 1.0).T @ x
        expected -= gradient * weight
        weight -= 0.01 * gradient
    train(model, optimizer, [torch.from_numpy(x) for x in inputs])
    np.testing.assert_allclose(model[0].weight.detach().numpy(), weight, rtol=1e-10)
    np.testing.assert_allclose(movement("0", model[0]).numpy(), expected, rtol=1e-5)


def test_a_small_weight_that_grows_outlives_a_large_one_that_shrinks() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.1, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    movement = Movement(model, optimizer)
    target = torch.tensor([[0.9, 0.2]])
    for _ in range(5):
        optimizer.zero_grad()
        (model[0].weight - target).square().sum().backward()
        optimizer.step()
    prune(model, movement, sparsity=0.5)
    assert (model[0].weight != 0).tolist() == [[True, False]]


def test_a_schedule_prunes_by_movement_and_both_resume() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Movement, Schedule]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        movement = Movement(model, optimizer)
        return model, optimizer, movement, Schedule(model, 0.75, importance=movement, end=6, every=2)

    batches = [torch.randn(4, 8) for _ in range(8)]
    model, optimizer, movement, schedule = build()
    for batch in batches:
        train(model, optimizer, [batch])
        schedule.step()
    assert int((model[0].weight == 0).sum()) == 48

    first, optimizer, movement, schedule = build()
    for batch in batches[:3]:
        train(first, optimizer, [batch])
        schedule.step()
    saved = first.state_dict(), movement.state_dict(), schedule.state_dict()
    second, optimizer, movement, schedule = build()
    second.load_state_dict(saved[0])
    movement.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    for batch in batches[3:]:
        train(second, optimizer, [batch])
        schedule.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_frozen_layers_are_left_out_and_removal_stops_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    movement = Movement(model, optimizer)
    assert list(movement.scores) == ["1"]
    with pytest.raises(ValueError, match="scores need at least one optimizer step"):
        prune(model, movement, layers=["1"])
    train(model, optimizer, [torch.ones(1, 2)])
    before = movement.scores["1"].clone()
    movement.remove()
    train(model, optimizer, [torch.ones(1, 2)])
    assert torch.equal(movement.scores["1"], before)
    with pytest.raises(ValueError, match="must be those it watches, got '0'"):
        prune(model, movement)


def test_bad_input_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer must hold the weight of layer '0'"):
        Movement(model, optimizer, layers=["0"])
    with pytest.raises(ValueError, match="of a layer of the model, got none"):
        Movement(nn.Sequential(nn.Linear(2, 2)), optimizer)
    with pytest.raises(ValueError, match="must name layers"):
        Movement(model, optimizer, layers=["nowhere"])
    movement = Movement(model, optimizer)
    with pytest.raises(ValueError, match="must hold scores of"):
        movement.load_state_dict({"steps_done": 1, "scores": {"1": torch.zeros(2, 2)}})
