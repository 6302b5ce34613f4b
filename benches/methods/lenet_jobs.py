"""Deep Compression of LeNet-300-100 on `digits`: pruned, clustered, entropy-coded.

Han et al. 2016, arXiv:1510.00149. Every job does all five folds of one seed.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from benches.methods import digits
from benches.methods.jobs import Result
from torch import nn

import tautorch as tt
from tautorch.demo.measure import float_bytes

PRUNED = ["0", "2"]
"""784 x 300 and 300 x 100; the last layer's 1,000 weights are clustered alone."""


def dense(seed: int, epochs: int) -> Result:
    """LeNet-300-100 trained on the images at 28x28."""
    right, states = [], []
    for fold in range(digits.FOLDS):
        torch.manual_seed(2000 + 100 * seed + fold)
        data = digits.fold(seed, fold)
        model = digits.train(digits.LeNet(), _batches(data, epochs, fold), lr=1e-3)
        right.append(digits.correct(model, data, digits.upscale))
        states.append(model.state_dict())
    return {"right": sum(right), "by_fold": right, "states": states, "bytes": float_bytes(digits.LeNet())}


def deep(
    seed: int, sparsity: float, bits: int, prune_epochs: int, cluster_epochs: int, dense: Result
) -> Result:
    """The file of each fold's network, and what it gets right when it is loaded again."""
    right, sizes = [], []
    for fold in range(digits.FOLDS):
        torch.manual_seed(3000 + 100 * seed + fold)
        data = digits.fold(seed, fold)
        teacher = digits.LeNet()
        teacher.load_state_dict(dense["states"][fold])
        model = compressed(teacher.eval(), data, fold, sparsity, bits, prune_epochs, cluster_epochs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lenet"
            tt.save(model, path, encode="entropy")
            sizes.append(path.stat().st_size)
            right.append(digits.correct(tt.load(path, digits.LeNet), data, digits.upscale))
    return {"right": sum(right), "by_fold": right, "sizes": sizes, "bytes": sum(sizes) / len(sizes)}


def compressed(
    teacher: nn.Module, data: digits.Digits, fold: int, sparsity: float, bits: int, prune_epochs: int,
    cluster_epochs: int,
) -> nn.Module:  # fmt: skip
    """Pruned by magnitude and then clustered, each time trained on under the dense network."""
    model = copy.deepcopy(teacher)
    loader = _batches(data, prune_epochs, fold)
    steps = len(loader)
    schedule = tt.prune.Schedule(
        model, sparsity, kind="cubic", end=max(2, steps // 2), every=max(1, steps // 60), layers=PRUNED
    )
    _distil(teacher, model, loader, lr=1e-3, callbacks=[schedule])
    schedule.remove()
    tt.quantize.cluster(model, bits)
    _distil(teacher, model, _batches(data, cluster_epochs, fold + 50), lr=3e-4)
    return tt.quantize.finalize(model)


def _batches(data: digits.Digits, epochs: int, seed: int) -> digits.Batches:
    steps = digits.steps_of(epochs, len(data.train_x))
    return digits.Batches(data, steps=steps, seed=seed, prepare=digits.upscale)


def _distil(
    teacher: nn.Module, model: nn.Module, loader: digits.Batches, *, lr: float, callbacks: Any = ()
) -> None:
    optimizer, cycle = digits.optimizer_for(model.parameters(), lr, len(loader), weight_decay=0.0)
    tt.distill.Distiller(
        teacher, model, tt.distill.SoftTarget(2.0, alpha=0.3), optimizer, scheduler=cycle,
        scheduler_interval="step", callbacks=callbacks, progress=False,
    ).fit(loader, 1)  # fmt: skip
    model.eval()
