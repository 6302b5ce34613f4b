"""Clustered weights: the k-means against brute force, what is trained, and what is left behind."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tautorch import distill
from tautorch.prune import prune
from tautorch.quantize import cluster, codebooks, finalize, gptq
from tautorch.quantize.clustering import kmeans


def best_error(values: np.ndarray, count: int) -> float:
    """The least squared error of `count` clusters: optimal ones are intervals of the sorted values."""
    x = np.sort(values)
    cuts = itertools.combinations(range(1, len(x)), count - 1)
    return min(sum(((part - part.mean()) ** 2).sum() for part in np.split(x, list(cut))) for cut in cuts)


def error(values: np.ndarray, centroids: np.ndarray) -> float:
    return float((np.abs(values[:, None] - centroids).min(axis=1) ** 2).sum())


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_kmeans_is_a_fixed_point_near_the_best(init: Any, rng: np.random.Generator) -> None:
    ratios = []
    for seed in range(15):
        values = np.concatenate([rng.normal(0, 1, 12), [9.0, 9.1]])
        found = kmeans(torch.from_numpy(values), 4, init, seed).numpy()
        label = np.abs(values[:, None] - found).argmin(axis=1)
        for k in range(4):
            np.testing.assert_allclose(found[k], values[label == k].mean(), rtol=1e-12)
        ratios.append(error(values, found) / best_error(values, 4))
    assert min(ratios) >= 1 - 1e-9
    # Twelve seeds: at most 1.15 from even places and quantiles, 1.5 from random values.
    assert np.median(ratios) < (2.0 if init == "random" else 1.3)


def test_linear_keeps_the_large_and_fills_empty_clusters(rng: np.random.Generator) -> None:
    values = np.concatenate([rng.normal(0, 0.01, 4000), [1.0]])
    found = kmeans(torch.from_numpy(values), 16).numpy()
    label = np.abs(values[:, None] - found).argmin(axis=1)
    assert len(np.unique(label)) == 16  # 13 of the 16 even places start empty
    assert found[-1] == pytest.approx(1.0, rel=1e-12)


def test_few_values() -> None:
    assert kmeans(torch.tensor([2.0, 1.0, 2.0]), 4).tolist() == [1.0, 2.0, 2.0, 2.0]
    assert kmeans(torch.tensor([]), 4).tolist() == [0.0] * 4


@pytest.mark.parametrize("pruned", [False, True])
def test_weights_are_the_nearest_entries(pruned: bool) -> None:
    layer = nn.Conv2d(4, 6, 3)
    if pruned:
        with torch.no_grad():
            layer.weight[torch.rand_like(layer.weight) < 0.5] = 0.0
    before = layer.weight.detach().clone()
    model = cluster(nn.Sequential(layer), bits=3)
    codebook, indices = codebooks(model)["0"]
    assert codebook.shape == (8,)
    assert indices.dtype == torch.uint8
    assert torch.equal(codebook[indices.long()], layer.weight)
    assert torch.equal(indices == 0, before == 0) or not pruned
    alive = codebook[1:] if pruned else codebook
    nearest = alive[(before.flatten()[:, None] - alive).abs().argmin(dim=1)].reshape(before.shape)
    expected = torch.where(before == 0, torch.zeros_like(before), nearest)
    assert torch.equal(layer.weight, expected)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model(x), nn.functional.conv2d(x, expected, layer.bias))


def test_what_rounded_to_zero_is_not_held_at_zero() -> None:
    model = prune(nn.Sequential(nn.Linear(40, 20)), lambda _, x: torch.rand_like(x.weight), sparsity=0.3)
    kept = model[0].weight != 0
    gptq(model, [torch.randn(256, 40)], bits=4)
    assert int(((model[0].weight == 0) & kept).sum()) > 20
    indices = codebooks(cluster(model, bits=4))["0"][1]
    assert torch.equal(indices != 0, kept)


def test_gradients_are_summed_by_cluster_and_zeros_stay() -> None:
    layer = nn.Linear(20, 10)
    with torch.no_grad():
        layer.weight[:, ::2] = 0.0
    model = cluster(nn.Sequential(layer), bits=2)
    x = torch.randn(7, 20)
    model(x).square().sum().backward()
    codebook, indices = codebooks(model)["0"]
    weight = codebook.double()[indices.long()].numpy()
    out = x.double().numpy() @ weight.T + layer.bias.detach().double().numpy()
    by_weight = 2 * out.T @ x.double().numpy()
    sums = [by_weight[indices.numpy() == k].sum() for k in range(4)]
    got = layer.parametrizations.weight.original.grad
    assert got is not None and got[0] == 0
    np.testing.assert_allclose(got[1:].numpy(), sums[1:], rtol=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    assert torch.equal(layer.weight[:, ::2], torch.zeros(10, 10))
    assert len(torch.unique(layer.weight)) == 4
    assert not torch.equal(codebooks(model)["0"][0], codebook)


def test_training_the_codebook_lowers_the_loss() -> None:
    teacher = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    student = cluster(copy.deepcopy(teacher), bits=2)
    x = torch.randn(256, 12)
    loader = [(x[i : i + 32], torch.zeros(32)) for i in range(0, 256, 32)]
    with torch.no_grad():
        before = float((student(x) - teacher(x)).square().mean())
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)

    def loss(s: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (s - t).square().mean()

    distill.Distiller(teacher, student, loss, optimizer, progress=False).fit(loader, epochs=30)
    with torch.no_grad():
        after = float((student(x) - teacher(x)).square().mean())
    assert after < 0.7 * before
    assert len(torch.unique(student[0].weight)) <= 4


def test_state_dict_and_finalize() -> None:
    model = cluster(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), bits=3, layers=["0"])
    twin = cluster(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), bits=3, layers=["0"])
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    plain = finalize(model)
    assert type(plain[0]) is nn.Linear
    assert isinstance(plain[0].weight, nn.Parameter)
    assert torch.equal(plain(x), expected)
    codebook, indices = codebooks(twin)["0"]
    assert torch.equal(codebook[indices.long()], plain[0].weight)


def test_an_assigned_weight_gives_the_mean_of_each_cluster() -> None:
    layer = nn.Linear(6, 5)
    cluster(nn.Sequential(layer), bits=2)
    indices = layer.parametrizations.weight[0].indices
    new = torch.randn(5, 6)
    layer.weight = new
    for k in range(4):
        mean = new[indices == k].double().mean()
        assert torch.allclose(layer.weight[indices == k].double(), mean, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8, got 1"),
        ({"bits": 9}, "bits must be a whole number from 2 to 8, got 9"),
        ({"init": "kmeans++"}, "init must be one of linear, density, random"),
        ({"layers": ["head"]}, "must name layers of the model, got 'head'"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(nn.Sequential(nn.Linear(4, 4)), **options)


def test_a_failed_step_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer '1' must be finite"):
        cluster(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="must have layers made by"):
        finalize(model)
