"""SparseGPT against the paper's algorithm written column by column with explicit inverses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautorch.prune import apply_masks, compute_masks, prune, sparsity_report


def factor_of(x: np.ndarray, dampening: float = 0.01) -> np.ndarray:
    """Cholesky of the inverse, upper, as the paper has it; x is [rows, K]."""
    hessian = x.T @ x
    hessian += dampening * np.diag(hessian).mean() * np.eye(len(hessian))
    return np.linalg.cholesky(np.linalg.inv(hessian)).T


def by_hand(weight: np.ndarray, x: np.ndarray, keep_of: Any, step: int) -> np.ndarray:
    """Every `step` columns are chosen together by `keep_of(e^2)`; no lazy updates."""
    w, upper = weight.copy(), factor_of(x)
    for start in range(0, w.shape[1], step):
        stop = min(start + step, w.shape[1])
        keep = keep_of(w[:, start:stop] ** 2 / np.diag(upper)[start:stop] ** 2)
        for i in range(start, stop):
            error = np.where(keep[:, i - start], 0.0, w[:, i] / upper[i, i])
            w[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
            w[:, i] = np.where(keep[:, i - start], w[:, i], 0.0)
    return w


def keep_share(share: float) -> Any:
    def keep(cost: np.ndarray) -> np.ndarray:
        order = np.argsort(cost, axis=None, kind="stable")
        flat = np.ones(cost.size, bool)
        flat[order[: int(share * cost.size + 1e-9)]] = False
        return flat.reshape(cost.shape)

    return keep


def keep_two(cost: np.ndarray) -> np.ndarray:
    keep = np.ones(cost.shape, bool)
    for row, values in zip(keep, cost, strict=True):
        row[np.argsort(values, kind="stable")[: len(values) - 2]] = False
    return keep


def keep_fours(cost: np.ndarray) -> np.ndarray:
    return np.repeat(keep_share(0.75)(cost.reshape(-1, 4, cost.shape[1]).sum(1)), 4, axis=0)


def correlated(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return rng.standard_normal((rows, 8)) @ rng.standard_normal((8, cols)) + 0.3 * rng.standard_normal(
        (rows, cols)
    )


@pytest.mark.parametrize(
    ("pattern", "sparsity", "keep", "step"),
    [
        ("unstructured", 0.5, keep_share(0.5), 128),
        ("2:4", 0.5, keep_two, 4),
        ("4x1", 0.75, keep_fours, 128),
    ],
)
def test_a_linear_layer_by_hand(
    rng: np.random.Generator, pattern: str, sparsity: float, keep: Any, step: int
) -> None:
    # 300 inputs: two whole blocks of 128 columns and a part of one.
    x = correlated(rng, 400, 300)
    layer = nn.Linear(300, 8).double()
    expected = by_hand(layer.weight.detach().numpy(), x, keep, step)
    batches = [torch.from_numpy(x[:150]), torch.from_numpy(x[150:])]
    prune(nn.Sequential(layer), "sparsegpt", pattern, sparsity, calibration=batches)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_its_unfolded_matrices(rng: np.random.Generator, groups: int) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=groups).double()
    x = torch.from_numpy(rng.standard_normal((6, 4, 9, 9)))
    columns = F.unfold(x, 3, 1, 1, 2).reshape(6, groups, -1, 25).permute(1, 0, 3, 2).flatten(1, 2).numpy()
    before = conv.weight.detach().reshape(groups, 8 // groups, -1).numpy().copy()
    prune(nn.Sequential(conv), "sparsegpt", "2:4", 0.5, calibration=[x])
    after = conv.weight.detach().reshape(before.shape).numpy()
    for group in range(groups):
        expected = by_hand(before[group], columns[group], keep_two, 4)
        np.testing.assert_allclose(after[group], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "4x1", "16x16"])
def test_what_is_kept_is_nearly_the_least_squares_fit_of_its_columns(
    rng: np.random.Generator, pattern: str
) -> None:
    """Kept weights lie between doing nothing and refitting each row on its mask, far nearer to the latter."""
    x = torch.from_numpy(correlated(rng, 500, 64))
    layer = nn.Linear(64, 32, bias=False).double()
    dense = layer.weight.detach().clone()
    share = 0.75 if pattern == "1:4" else 0.5
    prune(nn.Sequential(layer), "sparsegpt", pattern, share, calibration=[x], dampening=1e-6)
    mask = layer.weight.detach() != 0

    def loss(weight: torch.Tensor) -> float:
        return float((x @ (weight - dense).T).square().sum())

    refit = torch.zeros_like(dense)
    for row in range(32):
        columns = x[:, mask[row]]
        refit[row, mask[row]] = torch.linalg.lstsq(columns, x @ dense[row]).solution
    plain = loss(dense * mask)
    assert loss(refit) <= loss(layer.weight.detach()) < 0.5 * plain


def test_a_square_block_costs_what_removing_it_alone_costs(rng: np.random.Generator) -> None:
    """One block goes from the last 16 columns: the loss grows by exactly the least of the two costs."""
    x = correlated(rng, 100, 32)
    layer = nn.Linear(32, 32, bias=False).double()
    dense = layer.weight.detach().numpy().copy()
    prune(nn.Sequential(layer), "sparsegpt", "16x16", 0.25, calibration=[torch.from_numpy(x)])
    hessian = x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(32)
    inverse = np.linalg.inv(hessian)
    costs = {}
    for i in (0, 16):
        for j in (0, 16):
            # What comes before j is fixed: the inverse is that of the rest.
            rest = inverse if j == 0 else np.linalg.inv(hessian[j:, j:])
            part = dense[i : i + 16, j : j + 16]
            costs[i, j] = np.trace(part @ np.linalg.inv(rest[:16, :16]) @ part.T)
    i, j = min(costs, key=costs.__getitem__)
    after = layer.weight.detach().numpy()
    assert not after[i : i + 16, j : j + 16].any()
    assert np.count_nonzero(after == 0) == 256
    change = after - dense
    np.testing.assert_allclose(np.trace(change @ hessian @ change.T), costs[i, j], rtol=1e-7)


def test_counts_are_those_asked_for() -> None:
    x = [torch.randn(300, 150)]
    for pattern, share in (("unstructured", 0.61), ("4x1", 0.77), ("16x16", 0.6)):
        model = nn.Sequential(nn.Linear(150, 50))
        prune(model, "sparsegpt", pattern, share, calibration=x)
        row = sparsity_report(model, pattern).layers[0]
        assert row.zero_blocks == int(share * row.blocks)
    model = nn.Sequential(nn.Linear(150, 50))
    prune(model, "sparsegpt", sparsity=0.61, ranking="row", calibration=x)
    assert set((model[0].weight == 0).sum(1).tolist()) == {int(0.61 * 150)}


def test_inputs_that_never_move_go_first_and_change_nothing() -> None:
    x = torch.randn(64, 8, dtype=torch.float64)
    x[:, 3] = 0
    model = nn.Sequential(nn.Linear(8, 4)).double()
    dense = model[0].weight.detach().clone()
    prune(model, "sparsegpt", sparsity=0.125, calibration=[x])
    assert (model[0].weight[:, 3] == 0).all()
    model[0].weight.data.copy_(dense)
    prune(model, "sparsegpt", sparsity=0.0, calibration=[x])
    assert torch.equal(model[0].weight, dense)


def test_global_ranking_takes_where_it_costs_least() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight.mul_(10)
    x = [torch.randn(64, 16)]
    masks = compute_masks(model, "sparsegpt", sparsity=0.5, ranking="global", calibration=x)
    twin = prune(copy.deepcopy(model), "sparsegpt", sparsity=0.5, ranking="global", calibration=x)
    total = sum(int(mask.sum()) for mask in masks.values())
    assert total == 256
    assert masks["0"].sum() != masks["1"].sum()
    for name, mask in masks.items():
        assert torch.equal(twin.get_submodule(name).weight != 0, mask)


def test_masks_alone_leave_the_model() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    before = model[0].weight.detach().clone()
    masks = compute_masks(model, "sparsegpt", calibration=[torch.randn(64, 16)])
    assert torch.equal(model[0].weight, before)
    apply_masks(model, masks)
    assert torch.equal(model[0].weight, torch.where(masks["0"], before, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, "calibration must hold batches for importance"),
        ({"calibration": []}, "at least one batch"),
        ({"dampening": 0.0}, "dampening must be a positive number"),
        ({"calibration": [torch.full((2, 8), torch.nan)]}, "got NaN or Inf at layer '0'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity must be 0.5"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, "sparsegpt", **({"calibration": [torch.randn(4, 8)]} | options))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_half_precision_weights_that_overflow_are_refused() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.fill_(6e4)
    layer.half()
    model = nn.Sequential(layer)
    x = torch.ones(8, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"compensated weight of layer '0' must be finite"):
        prune(model, "sparsegpt", sparsity=0.5, calibration=[x])
    assert (model[0].weight == 6e4).all()
