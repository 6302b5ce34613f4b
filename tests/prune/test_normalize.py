"""Global rankings whose layers differ in scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.prune import compute_masks, make_global_masks, prune


def test_lamp_by_its_formula(rng: np.random.Generator) -> None:
    scores = {"a": np.abs(rng.standard_normal((6, 5))), "b": 10 * np.abs(rng.standard_normal((4, 8)))}
    masks = make_global_masks(
        {name: torch.from_numpy(value) for name, value in scores.items()}, "unstructured", 0.5, {}, "lamp"
    )
    lamp = {
        name: np.array([v**2 / (value[value >= v] ** 2).sum() for v in value.flat]).reshape(value.shape)
        for name, value in scores.items()
    }
    cut = np.sort(np.concatenate([value.flatten() for value in lamp.values()]))[31]
    for name, value in lamp.items():
        np.testing.assert_array_equal(masks[name].numpy(), value >= cut)


@pytest.mark.parametrize("normalize", ["mean", "lamp"])
def test_scale_makes_no_difference(normalize: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = compute_masks(model, pattern="4x1", ranking="global", normalize=normalize)
    with torch.no_grad():
        model[0].weight.mul_(1024)
    after = compute_masks(model, pattern="4x1", ranking="global", normalize=normalize)
    for name, mask in before.items():
        assert torch.equal(mask, after[name])
    assert compute_masks(model, ranking="global")["1"].sum() == 1


def test_bad_input_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="normalize must be one of none, mean, lamp"):
        prune(model, ranking="global", normalize="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='normalize must be "none" unless ranking="global"'):
        prune(model, normalize="mean")
    with pytest.raises(ValueError, match="must not be negative"):
        prune(model, lambda name, layer: -layer.weight.detach().abs(), ranking="global", normalize="lamp")
