"""Schedules: when masks are made, how sparse they are, and that they hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tautorch.prune import Schedule, masks_from_zeros, sparsity_report


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))


def run(model: nn.Module, schedule: Schedule, steps: int) -> list[float]:
    """Train with the schedule; the sparsity of the weights after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        schedule.step()
        found.append(sparsity_report(model).sparsity)
    return found


def test_cubic_follows_its_formula() -> None:
    model = net()
    found = run(model, Schedule(model, 0.8, begin=2, end=12, every=5), 14)
    # Due at 2 (0), 7 and 12: s (1 - (1 - (t - 2) / 10)^3).
    expected = [0.0] * 6 + [0.8 * (1 - 0.5**3)] * 5 + [0.8] * 3
    assert found == pytest.approx(expected, abs=1 / 400)


def test_oneshot_comes_at_begin() -> None:
    model = net()
    assert run(model, Schedule(model, 0.5, kind="oneshot", begin=3), 5) == pytest.approx(
        [0, 0, 0.5, 0.5, 0.5]
    )


def test_steps_come_as_listed() -> None:
    model = net()
    schedule = Schedule(model, kind="steps", steps={2: 0.25, 4: 0.75}, pattern="4x1")
    assert run(model, schedule, 5) == pytest.approx([0, 0.25, 0.25, 0.75, 0.75])
    assert schedule.done
    assert schedule.sparsity == 0.75


def test_n_of_m_goes_down_one_at_a_time() -> None:
    model = net()
    schedule = Schedule(model, kind="steps", steps={1: 0.1, 2: 0.25, 3: 0.4, 4: 0.5}, pattern="2:4")
    assert run(model, schedule, 4) == pytest.approx([0, 0.25, 0.25, 0.5])
    for weight in (model[0].weight, model[2].weight):
        assert ((weight.detach() != 0).reshape(20, 5, 4).sum(2) == 2).all()


def test_a_pruned_weight_stays_pruned_as_the_sparsity_rises() -> None:
    model = net()
    schedule = Schedule(model, 0.9, end=10, pattern="4x1")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    gone = {name: torch.zeros(20, 20, dtype=torch.bool) for name in ("0", "2")}
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        schedule.step()
        for name, mask in schedule.masks.items():
            assert not (gone[name] & mask).any()
            gone[name] = ~mask
    assert float(gone["0"].double().mean()) == pytest.approx(0.9)


def test_activation_importance_is_renewed_from_the_calibration() -> None:
    model = net()
    calibration = [torch.randn(8, 20)]
    schedule = Schedule(model, 0.5, kind="oneshot", importance="activation", calibration=calibration)
    run(model, schedule, 1)
    assert ((model[0].weight != 0).sum(1) == 10).all()


def test_state_continues_where_it_stopped() -> None:
    model = net()
    schedule = Schedule(model, 0.8, end=10, every=2)
    run(model, schedule, 5)
    twin = copy.deepcopy(model)
    other = Schedule(twin, 0.8, end=10, every=2)
    other.load_state_dict(schedule.state_dict())
    torch.manual_seed(3)
    run(model, schedule, 6)
    torch.manual_seed(3)
    run(twin, other, 6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    assert other.steps_done == schedule.steps_done == 11


def test_removed_masks_let_go() -> None:
    model = net()
    schedule = Schedule(model, 0.5, kind="oneshot")
    run(model, schedule, 1)
    masks = masks_from_zeros(model)
    schedule.remove()
    run(model, schedule, 1)
    assert model[0].weight.detach()[~masks["0"]].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "sparsity must be given"),
        ({"sparsity": 1.0, "end": 5}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": 0.5}, ValueError, "end must be a step after begin=0"),
        ({"sparsity": 0.5, "begin": 5, "end": 5}, ValueError, "end must be a step after begin=5"),
        ({"sparsity": 0.5, "end": 5, "every": 0}, ValueError, "every >= 1"),
        ({"sparsity": 0.5, "end": 5, "begin": -1}, ValueError, "begin must be >= 0"),
        ({"sparsity": 0.5, "kind": "linear", "end": 5}, ValueError, "kind must be one of"),
        ({"sparsity": 0.5, "kind": "steps"}, ValueError, "steps must be given"),
        ({"kind": "steps", "steps": {}}, ValueError, "rising sparsity"),
        ({"kind": "steps", "steps": {2: 0.5, 4: 0.2}}, ValueError, "rising sparsity"),
        ({"kind": "steps", "steps": {0: 0.5}}, ValueError, "step >= 1"),
        ({"kind": "steps", "steps": {2: 0.5}, "sparsity": 0.6}, ValueError, "equal the last of steps"),
        ({"sparsity": 0.6, "end": 5, "pattern": "2:4"}, ValueError, "sparsity must be 0.5 for pattern 2:4"),
        ({"sparsity": 0.5, "end": 5, "layers": ["9"]}, ValueError, "must name layers"),
        (
            {"sparsity": 0.5, "end": 5, "importance": "activation"},
            ValueError,
            "calibration must hold batches",
        ),
        ({"sparsity": 0.5, "end": 5, "calibration": iter([])}, ValueError, "re-iterable"),
        (
            {"sparsity": 0.5, "end": 5, "calibration": torch.ones(2)},
            TypeError,
            "must be an iterable of batches",
        ),
        ({"sparsity": 0.5, "kind": "iterative"}, ValueError, "rounds must be given"),
        ({"sparsity": 0.5, "end": 5, "rounds": 3}, ValueError, "rounds must be given"),
        ({"sparsity": 0.5, "kind": "iterative", "rounds": 0}, ValueError, "rounds must be an int >= 1"),
        ({"sparsity": 0.5, "end": 5, "rewind": 1}, ValueError, "before the first pruning, 1, got 1"),
        ({"sparsity": 0.5, "end": 5, "normalize": "mean"}, ValueError, 'unless ranking="global"'),
        ({"sparsity": 0.5, "end": 5, "ranking": "up"}, ValueError, "ranking must be one of"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(net(), **options)


def test_rounds_take_the_same_share_of_what_is_left() -> None:
    model = net()
    schedule = Schedule(model, 0.875, kind="iterative", rounds=3, begin=2, every=2)
    assert run(model, schedule, 7) == pytest.approx([0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875])
    assert schedule.done


@pytest.mark.parametrize("rewind", [0, 2])
def test_rewinding_goes_back_to_the_early_values_under_the_new_masks(rewind: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = Schedule(
        model, 0.75, kind="iterative", rounds=2, begin=4, every=3, rewind=rewind, optimizer=optimizer
    )
    early = copy.deepcopy(model.state_dict())
    for t in range(1, 9):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        trained = copy.deepcopy(model.state_dict())
        schedule.step()
        if t == rewind:
            early = copy.deepcopy(model.state_dict())
        if t in (4, 7):
            assert not optimizer.state
            for name, mask in schedule.masks.items():
                # The masks are those of the trained weights, the values those of the early ones.
                least = trained[f"{name}.weight"].abs()[mask].min()
                assert least >= trained[f"{name}.weight"].abs()[~mask].max()
                expected = torch.where(mask, early[f"{name}.weight"], 0.0)
                assert torch.equal(model.get_submodule(name).weight.detach(), expected)
                assert torch.equal(model.get_submodule(name).bias.detach(), early[f"{name}.bias"])


def test_a_rewinding_schedule_resumes() -> None:
    model = net()
    options = {"kind": "iterative", "rounds": 2, "begin": 3, "every": 3, "rewind": 1}
    schedule = Schedule(model, 0.75, **options)
    run(model, schedule, 2)
    twin = copy.deepcopy(model)
    other = Schedule(twin, 0.75, **options)
    other.load_state_dict(schedule.state_dict())
    for chosen, run_by in ((model, schedule), (twin, other)):
        torch.manual_seed(3)
        run(chosen, run_by, 5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    with pytest.raises(ValueError, match="must hold the values of this model"):
        other.load_state_dict(schedule.state_dict() | {"early": {"x": torch.zeros(1)}})
