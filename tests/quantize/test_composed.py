"""Chains of three and four methods that end in quantisation, through to compiled layers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautorch
from tautorch import distill
from tautorch.nn import Int8Linear, SparseLinear
from tautorch.prune import hold_masks, prune
from tautorch.quantize import cluster, codebooks, finalize, prepare_qat, smooth


def teacher() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


def data() -> list[Tensor]:
    return [torch.randn(64, 32) for _ in range(3)]


def loss(student: Tensor, taught: Tensor, _: Tensor) -> Tensor:
    return (student - taught).square().mean()


def tuned(model: nn.Module, source: nn.Module, batches: list[Tensor], callbacks: Any = ()) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit = distill.Distiller(source, model, loss, optimizer, progress=False, callbacks=callbacks)
    fit.fit([(x, x) for x in batches], epochs=3)
    return model.eval()


def compiled(model: Any, **kinds: Any) -> Any:
    plan = {name.replace("l", ""): make for name, make in kinds.items()}
    return tautorch.convert(model, plan, example_inputs=torch.randn(5, 32))


SPARSE = partial(SparseLinear.from_float, pattern="unstructured")


def test_smoothed_pruned_quantised_distilled() -> None:
    source, batches = teacher(), data()
    with torch.no_grad():
        source[0].weight[5] = 40.0
    model = prune(smooth(copy.deepcopy(source), batches), sparsity=0.4)
    with hold_masks(model) as masks:
        tuned(model, source, batches, [masks])
    zeros = model[1].weight == 0
    tuned(prepare_qat(model, bits=4), source, batches)
    expected = model(batches[0])
    finalize(model)
    assert bool((model[1].weight[zeros] == 0).all())
    compiled(model, l1=SPARSE, l3=SPARSE)
    torch.testing.assert_close(model(batches[0]), expected, rtol=1e-4, atol=1e-4)


def test_pruned_clustered_distilled_and_compiled(tmp_path: Any) -> None:
    source, batches = teacher(), data()
    model = cluster(prune(copy.deepcopy(source), sparsity=0.7, layers=["1"]), bits=4)
    tuned(model, source, batches)
    books = codebooks(model)
    assert float(books["1"][0][0]) == 0.0
    finalize(model)
    assert len(torch.unique(model[1].weight)) <= 16
    assert float((model[1].weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    tautorch.save(model, tmp_path / "m.safetensors", encode="entropy")
    again = tautorch.load(tmp_path / "m.safetensors", teacher)
    assert torch.equal(again(batches[0]), model(batches[0]))
    expected = model(batches[0])
    compiled(model, l1=SPARSE, l3=Int8Linear.from_float)
    assert (model(batches[0]) - expected).norm() < 0.03 * expected.norm()
