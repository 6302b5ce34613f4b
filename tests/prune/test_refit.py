"""Refitted weights against numpy's least squares."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.prune import Schedule, compute_masks, prune


def correlated(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    mixed = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, cols))
    return mixed + 0.5 * rng.standard_normal((rows, cols))


@pytest.mark.parametrize("importance", ["magnitude", "activation", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_many_steps_reach_the_least_squares_fit(
    rng: np.random.Generator, importance: str, pattern: str
) -> None:
    x = correlated(rng, 300, 24)
    layer = nn.Linear(24, 8).double()
    dense = layer.weight.detach().numpy().copy()
    masks = compute_masks(
        nn.Sequential(layer), importance, pattern, calibration=[torch.from_numpy(x)], dampening=0.02
    )
    batches = (torch.from_numpy(part) for part in (x[:99], x[99:]))
    prune(nn.Sequential(layer), importance, pattern, calibration=batches, dampening=0.02, refit=60)
    hessian = x.T @ x
    hessian += 0.02 * np.diag(hessian).mean() * np.eye(24)
    for row, mask, weight in zip(dense, masks["0"].numpy(), layer.weight.detach().numpy(), strict=True):
        expected = np.zeros(24)
        expected[mask] = np.linalg.solve(hessian[np.ix_(mask, mask)], (hessian @ row)[mask])
        np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-8)


def test_each_step_brings_the_outputs_nearer(rng: np.random.Generator) -> None:
    x = torch.from_numpy(correlated(rng, 300, 64))
    dense = nn.Linear(64, 16).double()
    errors = []
    for steps in (0, 1, 5, 20, 80):
        layer = copy.deepcopy(dense)
        prune(nn.Sequential(layer), calibration=[x], refit=steps, dampening=1e-9)
        errors.append((layer(x) - dense(x)).square().sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.3 * errors[0]
    assert errors[3] < 1.1 * errors[4]


def test_a_grouped_convolution_and_dead_inputs() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2).double()
    dense = copy.deepcopy(conv)
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    x[:, 1] = 0
    plain = prune(nn.Sequential(copy.deepcopy(conv)), calibration=[x])
    prune(nn.Sequential(conv), calibration=[x], refit=30)
    assert torch.equal(conv.weight == 0, plain[0].weight == 0)
    # What reads the dead channel is of the first group, and stays.
    assert torch.equal(conv.weight[:4, 1], plain[0].weight[:4, 1])
    assert (conv(x) - dense(x)).square().sum() < (plain[0](x) - dense(x)).square().sum()


def test_a_schedule_refits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    twin = copy.deepcopy(model)
    x = [torch.randn(64, 8)]
    Schedule(model, 0.5, kind="oneshot", calibration=x, refit=5).step()
    prune(twin, calibration=x, refit=5)
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": -1}, "refit must be a number of steps >= 0"),
        ({"refit": True}, "refit must be a number of steps >= 0"),
        ({"refit": 5, "calibration": None}, "calibration must hold batches for refit=5"),
        ({"refit": 5, "calibration": []}, "at least one batch"),
        ({"refit": 5, "dampening": 0.0}, "dampening must be a positive number"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        prune(model, **({"calibration": [torch.randn(8, 4)]} | options))
    assert torch.equal(model[0].weight, before)
