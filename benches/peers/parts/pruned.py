"""A layer pruned as users prune: trained on scikit-learn's digits, cut by magnitude, trained again."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from tautorch import prune
from tautorch.demo import digits

SHAPE = (1024, 4096)
"""(K, N) of the layer; it stands in an MLP 64 -> K -> N -> 10."""


@torch.inference_mode(False)
@torch.enable_grad()
def layers(sparsities: Iterable[float]) -> list[tuple[float, nn.Linear]]:
    """The pruned layer at each sparsity, from one trained network."""
    data = digits.load()
    torch.manual_seed(0)
    k, n = SHAPE
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, k), nn.ReLU(), nn.Linear(k, n), nn.ReLU(), nn.Linear(n, digits.CLASSES)
    )
    _train(model, data, epochs=4)
    pruned = []
    for sparsity in sparsities:
        student = copy.deepcopy(model)
        middle = student[3]
        assert isinstance(middle, nn.Linear)
        with torch.no_grad():
            mask = prune.make_mask(middle.weight.abs(), "unstructured", sparsity)
        _train(student, data, epochs=2, mask=mask)
        pruned.append((sparsity, middle.eval().requires_grad_(False)))
    return pruned


def _train(model: nn.Sequential, data: digits.Digits, epochs: int, mask: torch.Tensor | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
            if mask is not None:
                with torch.no_grad():
                    model[3].weight.mul_(mask)  # type: ignore[operator]
