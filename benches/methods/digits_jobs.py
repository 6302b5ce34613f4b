"""What the methods do to small networks on `digits`: one job for each way of compressing.

Every job does all five folds of one seed; `right` is the number of images of 1,797 that are predicted
correctly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from benches.methods import digits
from benches.methods.jobs import Result
from torch import Tensor, nn

import tautorch as tt

STUDENT_WIDTH = 6


def teacher(seed: int, width: int, epochs: int) -> Result:
    """Residual networks trained on all labels of their fold."""

    def one(data: digits.Digits, fold: int) -> nn.Module:
        steps = digits.steps_of(epochs, len(data.train_x))
        loader = digits.Batches(data, steps=steps, seed=fold)
        return digits.train(digits.ResNet(width), loader, smoothing=0.05)

    return _folds(seed, one)


def alone(seed: int, steps: int, per_class: int, mixed: bool = False) -> Result:
    """Students trained on a few labelled images of their fold."""

    def one(data: digits.Digits, fold: int) -> nn.Module:
        loader = _few_labels(data, per_class, steps, seed, fold, mixed)
        return digits.train(digits.ResNet(STUDENT_WIDTH), loader)

    return _folds(seed, one)


def distilled(
    seed: int, steps: int, per_class: int, temperature: float, teacher: Result, mixed: bool = False
) -> Result:
    """The same students, on the teacher's soft targets: of the few images, as they are or mixed with each
    other, or (0 per class) of all, unlabelled."""

    def one(data: digits.Digits, fold: int) -> nn.Module:
        loader = _few_labels(data, per_class, steps, seed, fold, mixed)
        student = digits.ResNet(STUDENT_WIDTH)
        loss = tt.distill.SoftTarget(temperature, alpha=0.1 if per_class and not mixed else 0.0)
        return _distil(_teacher(teacher, fold), student, loader, loss, lr=3e-3)

    return _folds(seed, one)


def mutual(seed: int, steps: int, per_class: int) -> Result:
    """Two students that learn from one another and from a few labels; `right` is the mean of both."""
    others: list[int] = []

    def one(data: digits.Digits, fold: int) -> nn.Module:
        peers = tt.distill.Peers(digits.ResNet(STUDENT_WIDTH) for _ in range(2))
        loader = _few_labels(data, per_class, steps, seed, fold)
        _distil(None, peers, loader, tt.distill.Mutual(), lr=3e-3)
        others.append(digits.correct(peers[1], data))
        return peers[0]

    result = _folds(seed, one, keep=False)
    return result | {"first": result["right"], "right": (result["right"] + sum(others)) / 2}


def sparse(seed: int, sparsity: float, epochs: int, teacher: Result) -> Result:
    """The teachers pruned to 4x1 blocks while they learn from themselves; right: with compiled sparse
    layers."""

    def one(data: digits.Digits, fold: int) -> nn.Module:
        dense = _teacher(teacher, fold)
        student = copy.deepcopy(dense)
        steps = digits.steps_of(epochs, len(data.train_x))
        loader = digits.Batches(data, steps=steps, seed=fold)
        names = [name for name, layer in student.named_modules() if _prunable(layer)]
        schedule = tt.prune.Schedule(
            student, sparsity, pattern="4x1", kind="cubic", end=max(2, steps // 2), every=max(1, steps // 60),
            layers=names,
        )  # fmt: skip
        _distil(dense, student, loader, tt.distill.SoftTarget(4.0, alpha=0.1), lr=2e-3, callbacks=[schedule])
        schedule.remove()
        tt.fuse(student, data.train_x[:64])
        make = partial(tt.nn.SparseConv2d.from_float, pattern="4x1", weight_dtype=torch.float32)
        return tt.convert(student, dict.fromkeys(names, make))

    return _folds(seed, one, keep=False)


def int8(seed: int, teacher: Result) -> Result:
    """The teachers with every layer int8, static ranges, no training."""

    def one(data: digits.Digits, fold: int) -> nn.Module:
        model = _teacher(teacher, fold)
        tt.fuse(model, data.train_x[:64])
        ranges = tt.quantize.calibrate(model, data.train_x.split(64), observer="mse")
        return tt.convert(model, {name: _static(found) for name, found in ranges.items()})

    return _folds(seed, one, keep=False)


def _static(found: tt.quantize.QParams) -> Callable[[Any], nn.Module]:
    def make(layer: Any) -> nn.Module:
        kind = tt.nn.Int8Conv2d if isinstance(layer, nn.Conv2d) else tt.nn.Int8Linear
        return kind.from_float(layer, quant="static", x_scale=found.scale, x_zero_point=found.zero_point)

    return make


def _prunable(layer: nn.Module) -> bool:
    """The 3x3 convolutions but the first, which has one input: 97 % of the weights."""
    return isinstance(layer, nn.Conv2d) and layer.in_channels > 1 and layer.kernel_size == (3, 3)


def _few_labels(
    data: digits.Digits, per_class: int, steps: int, seed: int, fold: int, mixed: bool = False
) -> digits.Batches:
    """Batches of a few images of each digit, or (0 per class) of all."""
    some = digits.few(data, per_class, seed) if per_class else data
    return digits.Batches(some, steps=steps, seed=fold, mixed=mixed)


def _folds(seed: int, one: Callable[[digits.Digits, int], nn.Module], keep: bool = True) -> Result:
    """Make a model for each fold, and count what they get right."""
    right, states = [], []
    for fold in range(digits.FOLDS):
        torch.manual_seed(1000 * seed + fold)
        data = digits.fold(seed, fold)
        model = one(data, fold)
        right.append(digits.correct(model, data))
        states.append(model.state_dict() if keep else {})
    return {"right": sum(right), "by_fold": right, "states": states}


def _teacher(result: Result, fold: int) -> nn.Module:
    state: dict[str, Tensor] = result["states"][fold]
    model = digits.ResNet(len(state["0.weight"]))
    model.load_state_dict(state)
    return model.eval()


def _distil(
    teacher: nn.Module, student: nn.Module, loader: digits.Batches, loss: Any, *, lr: float,
    callbacks: Sequence[Any] = (),
) -> nn.Module:  # fmt: skip
    optimizer, cycle = digits.optimizer_for(student.parameters(), lr, len(loader))
    tt.distill.Distiller(
        teacher, student, loss, optimizer, scheduler=cycle, scheduler_interval="step", callbacks=callbacks,
        progress=False,
    ).fit(loader, 1)  # fmt: skip
    return student.eval()
