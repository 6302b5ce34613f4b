"""Soft thresholding against its formula, and ISTA against the lasso's own optimality conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.prune import SoftThreshold, soft_threshold, sparsity_report, threshold_for


def test_the_formula(rng: np.random.Generator) -> None:
    w = rng.standard_normal((7, 5))
    expected = np.sign(w) * np.maximum(np.abs(w) - 0.4, 0)
    np.testing.assert_allclose(soft_threshold(torch.from_numpy(w), 0.4).numpy(), expected, rtol=1e-15)
    rows = rng.random((7, 1))
    expected = np.sign(w) * np.maximum(np.abs(w) - rows, 0)
    np.testing.assert_allclose(
        soft_threshold(torch.from_numpy(w), torch.from_numpy(rows)).numpy(), expected, rtol=1e-15
    )


def test_a_threshold_by_sparsity() -> None:
    w = torch.arange(1.0, 11).reshape(2, 5)
    assert threshold_for(w, 0.0) == 0.0
    assert threshold_for(w, 0.3) == 3.0
    assert int((soft_threshold(w, threshold_for(w, 0.3)) == 0).sum()) == 3


def lasso(pattern: str, rng: np.random.Generator) -> tuple[nn.Linear, np.ndarray, np.ndarray]:
    """Least squares with a penalty of 2, solved by ISTA; the model, X^T X and X^T Y."""
    x, y = rng.standard_normal((60, 8)), rng.standard_normal((60, 8))
    layer = nn.Linear(8, 8, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), 0.009)
    ista = SoftThreshold(nn.Sequential(layer), optimizer, 5.0, pattern=pattern)
    inputs, target = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(120):
        optimizer.zero_grad()
        (0.5 * (layer(inputs) - target).square().sum()).backward()
        optimizer.step()
    ista.remove()
    return layer, x.T @ x, x.T @ y


def test_ista_solves_the_lasso(rng: np.random.Generator) -> None:
    layer, gram, cross = lasso("unstructured", rng)
    w = layer.weight.detach().numpy().T
    slope = gram @ w - cross
    assert 0.1 < (w == 0).mean() < 0.9
    # Zero belongs to the subdifferential: the slope is -5 sign(w), and within 5 where w is zero.
    np.testing.assert_allclose(slope[w != 0], -5 * np.sign(w[w != 0]), atol=1e-6)
    assert np.abs(slope[w == 0]).max() <= 5 + 1e-6


def test_blocks_vanish_whole_by_the_group_lasso(rng: np.random.Generator) -> None:
    layer, gram, cross = lasso("4x1", rng)
    w = layer.weight.detach().numpy()
    slope = (gram @ w.T - cross).T
    blocks, slopes = w.reshape(2, 4, 8), slope.reshape(2, 4, 8)
    norms = np.linalg.norm(blocks, axis=1, keepdims=True)
    gone = norms == 0
    assert gone.any()
    assert not gone.all()
    expected = -5 * 2 * blocks / np.where(gone, 1, norms)
    kept = np.broadcast_to(~gone, blocks.shape)
    np.testing.assert_allclose(slopes[kept], expected[kept], atol=1e-6)
    assert np.linalg.norm(slopes, axis=1, keepdims=True)[gone].max() <= 10 + 1e-6


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 16)).sub(1).square().mean().backward()
    optimizer.step()


def test_what_is_the_threshold_itself_is_zero() -> None:
    """49 times the reciprocal of 49 is less than 1."""
    layer = nn.Linear(100, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 101.0))
    SoftThreshold(layer, torch.optim.SGD(layer.parameters(), 0.0), sparsity=0.49, ramp=1).step()
    assert int((layer.weight == 0).sum()) == 49


@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_a_target_sparsity_is_met_at_every_step_of_its_ramp(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    SoftThreshold(model, optimizer, sparsity=0.75, ramp=4, pattern=pattern)
    for t in range(1, 8):
        step(model, optimizer)
        due = 0.75 * (1 - (1 - min(t, 4) / 4) ** 3)
        for layer in sparsity_report(model, pattern).layers:
            assert layer.zero_blocks == int(due * layer.blocks + 1e-9)


def test_the_step_by_sparsity_is_the_soft_threshold_at_the_quantile() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shrink = SoftThreshold(model, optimizer, sparsity=0.5)
    before = model[0].weight.detach().clone()
    shrink.step()
    expected = soft_threshold(before, threshold_for(before, 0.5))
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-5, atol=1e-7)


def test_it_resumes_and_removal_stops_it() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shrink = SoftThreshold(model, optimizer, sparsity=0.5, ramp=10)
    shrink.load_state_dict({"steps_done": 9})
    step(model, optimizer)
    assert shrink.state_dict() == {"steps_done": 10}
    assert sparsity_report(model).sparsity == 0.5
    shrink.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_the_learning_rate_is_that_of_the_step_after_a_checkpoint_too() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    SoftThreshold(model, optimizer, lam=1.0)
    optimizer.load_state_dict(torch.optim.SGD(nn.Linear(2, 1, bias=False).parameters(), 1e-3).state_dict())
    model.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 2), 0.999))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "one of lam and sparsity must be given"),
        ({"lam": 1.0, "sparsity": 0.5}, ValueError, "one of lam and sparsity must be given"),
        ({"lam": -1.0}, ValueError, "lam must be a positive number"),
        ({"lam": {"1": 1.0}}, ValueError, "lam must name each layer, got none for '0'"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": 0.5, "ramp": 0}, ValueError, "ramp must be a number of steps >= 1"),
        ({"lam": 1.0, "pattern": "2:4"}, ValueError, 'pattern must be "unstructured" or blocks'),
        ({"lam": 1.0, "layers": ["7"]}, ValueError, "must name layers"),
        ({"lam": 1.0, "layers": ["1"]}, ValueError, "optimizer must hold the weight of layer '1'"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    with pytest.raises(error, match=message):
        SoftThreshold(model, optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("theta", [-0.1, float("nan")])
def test_bad_thresholds_are_refused(theta: float) -> None:
    with pytest.raises(ValueError, match="theta must be >= 0"):
        soft_threshold(torch.ones(2), theta)
    with pytest.raises(TypeError, match="must be a floating point tensor"):
        soft_threshold(torch.ones(2, dtype=torch.int8), 0.1)
